"""One LLaVA-shaped model with fixed random weights, as transformers and as OmniLit have it, and batches for both.

Unless it is made smaller, the language model has the shape of SmolLM2-135M: 30 layers, width 576, 9 heads, 3 of keys and values,
vocabulary 49,152, tied embeddings. The vision tower is a CLIP of 6 layers, width 384, 256 patches. LoRA of rank 16 on all seven
linear layers of each block; the projector is trained as well, the rest is frozen.

Shape suffixes: B rows, T tokens, N pictures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, NUM_LAYERS = 49_152, 576, 30
NUM_PATCHES, IMAGE_SIZE, IMAGE_TOKEN = 256, 224, 49_151
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32.0


def write_weights(
    folder: Path,
    vocabulary: int = VOCABULARY,
    width: int = WIDTH,
    num_layers: int = NUM_LAYERS,
    vision_width: int = 384,
    max_shard_size: str = "50GB",
) -> None:
    """Writes the whole model, `llava`, with its processor, and its two towers, `language` and `vision`.

    A file of weights is mapped: on a CPU, what was read of it stays in memory while one of its weights is used. Large models come
    in many files, of `max_shard_size` each.
    """
    import transformers as hf

    text = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=6,
        num_attention_heads=vision_width // 64,
        image_size=IMAGE_SIZE,
        patch_size=14,
    )
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(20)
    model = hf.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder / "llava")
    causal = hf.LlamaForCausalLM(text)
    causal.model.load_state_dict(model.model.language_model.state_dict())
    causal.tie_weights()
    causal.save_pretrained(folder / "language", max_shard_size=max_shard_size)
    model.model.vision_tower.save_pretrained(folder / "vision")
    torch.save(model.model.multi_modal_projector.state_dict(), folder / "projector.pt")
    _write_processors(folder, vocabulary)


def _write_processors(folder: Path, vocabulary: int) -> None:
    """Writes the tokenizer of the language model, and the processor of the whole."""
    import transformers as hf

    tokenizer = _tokenizer({})
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(folder / "language")
    hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        _tokenizer({"<image>": vocabulary - 1}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{% for content in message.content %}"
        "{{ '<image>' if content.type == 'image' else content.text }}{% endfor %}<eos>{% endfor %}",
    ).save_pretrained(folder / "llava")


def _tokenizer(placeholders: dict[str, int]) -> Any:
    """A tokenizer of single letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<unk>": 1, **{chr(code): code - 30 for code in range(32, 127)}, **placeholders}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*placeholders]})
    return tokenizer


def lora_config(modules_to_save: list[str] | None = None) -> Any:
    """The adapters, for PEFT."""
    from peft import LoraConfig

    targets = rf".*language_model.*\.({'|'.join(TARGETS)})"
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, modules_to_save=modules_to_save)  # type: ignore[arg-type]


def llava(folder: Path) -> Any:
    """The model as transformers has it."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32)


def peft_llava(folder: Path) -> nn.Module:
    """The model with adapters, and a projector that trains."""
    from peft import get_peft_model

    peft_model = get_peft_model(llava(folder), lora_config(["multi_modal_projector"]))
    draw_adapters(peft_model)
    return peft_model


def omnilit_parts(folder: Path, projector: Literal["full", "frozen"] = "full") -> dict[str, Any]:
    """The arguments of a LitModule for the same model."""
    from encoders.image import HFVisionEncoder
    from encoders.projectors import MLPProjector
    from encoders.tuning import LoRA, Tune
    from models.language import LanguageModel

    lora = Tune(mode="lora", lora=LoRA(r=RANK, alpha=ALPHA, target_modules=TARGETS))
    return {
        "language_model": LanguageModel(name_or_path=str(folder / "language"), tune=lora),
        "image_encoder": HFVisionEncoder(name_or_path=str(folder / "vision"), layer=-2),
        "image_projector": MLPProjector(tune=Tune(mode=projector)),
    }


def load_omnilit(module: Any, folder: Path) -> None:
    """Builds a LitModule of `omnilit_parts` and gives it the same projector and adapters."""
    module.configure_model()
    module.model.image_projector.load_state_dict(torch.load(folder / "projector.pt", weights_only=True))
    draw_adapters(module)


def draw_adapters(module: nn.Module) -> None:
    """The same adapters in each model, none of them 0."""
    generator = torch.Generator().manual_seed(21)
    adapters = {name[name.index("layers.") :]: p for name, p in module.named_parameters() if "lora_" in name and p.requires_grad}
    with torch.no_grad():
        for _, adapter in sorted(adapters.items()):
            adapter.normal_(0, 0.02, generator=generator)


@dataclass(frozen=True)
class Rows:
    """Random rows: a picture, a question, an answer.

    Args:
        tokens_BT: Ids, placeholders included.
        labels_BT: -100 where there is no loss.
        pixels_NCHW: A picture a row.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    pixels_NCHW: Tensor


def make_rows(seed: int, num_rows: int, num_tokens: int, num_supervised: int) -> Rows:
    """Rows whose last `num_supervised` positions have a label; where these reach into the pictures, random ones."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(2, IMAGE_TOKEN, (num_rows, num_tokens), generator=generator)
    labels_BT = tokens_BT.clone()
    labels_BT[:, : num_tokens - num_supervised] = -100
    tokens_BT[:, 4 : 4 + NUM_PATCHES] = IMAGE_TOKEN
    return Rows(tokens_BT, labels_BT, torch.randn(num_rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))
