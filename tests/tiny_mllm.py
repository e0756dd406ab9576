"""Tiny ready multimodal models with their processors, in folders: random weights, true special tokens, faithful templates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from tests.tiny import make_tokenizer

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "gemma3", "qwen2_audio"]
FAMILIES: tuple[Family, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "gemma3", "qwen2_audio")

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
AUDIO_TOKENS = ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
LLAVA_TOKENS = ["<image>", "<video>"]
GEMMA_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}

QWEN_VL_TEMPLATE = """{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}<|im_end|>
{% else %}{% for content in message.content %}{% if content.type == 'image' or 'image' in content -%}
<|vision_start|><|image_pad|><|vision_end|>{% elif content.type == 'video' or 'video' in content -%}
<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content.text }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAVA_TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' -}}
{% for content in message.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor -%}
{% for content in message.content | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor -%}
{% for content in message.content | selectattr('type', 'equalto', 'text') %}{{ content.text }}{% endfor -%}
{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEXT = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}


def make_mllm(folder: Path, family: Family) -> Path:
    """Writes a tiny model of a family, with its processor, to a folder."""
    make: dict[Family, Callable[[Path], Any]] = {
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "llava": _llava,
        "llava_onevision": _llava_onevision,
        "gemma3": _gemma3,
        "qwen2_audio": _qwen2_audio,
    }
    from transformers import AutoModelForMultimodalLM

    config = make[family](folder)
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        model = AutoModelForMultimodalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):  # Gemma 3 leaves it at 0 until a checkpoint fills it
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path, tokens: list[str]) -> Any:
    tokenizer = make_tokenizer(folder, "chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


def _qwen_vl_ids(tokenizer: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, tokenizer.convert_tokens_to_ids(VISION_TOKENS), strict=True))


def _qwen_vl_processor(folder: Path, tokenizer: Any, kind: Any, patch_size: int, video: Any) -> None:
    from transformers import Qwen2VLImageProcessor

    images = Qwen2VLImageProcessor(size=PIXELS, patch_size=patch_size)
    videos = video(size=PIXELS, patch_size=patch_size)
    kind(images, tokenizer, videos, chat_template=QWEN_VL_TEMPLATE).save_pretrained(folder)


def _qwen2_vl(folder: Path) -> Any:
    import transformers as hf

    tokenizer = _tokenizer(folder, VISION_TOKENS)
    _qwen_vl_processor(folder, tokenizer, hf.Qwen2VLProcessor, 14, hf.Qwen2VLVideoProcessor)
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "initializer_range": 0.2}
    return hf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_vl_ids(tokenizer))


def _qwen2_5_vl(folder: Path) -> Any:
    import transformers as hf

    tokenizer = _tokenizer(folder, VISION_TOKENS)
    _qwen_vl_processor(folder, tokenizer, hf.Qwen2_5_VLProcessor, 14, hf.Qwen2VLVideoProcessor)
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "initializer_range": 0.2,
    }
    return hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_qwen_vl_ids(tokenizer))


def _qwen3_vl(folder: Path) -> Any:
    import transformers as hf

    tokenizer = _tokenizer(folder, VISION_TOKENS)
    _qwen_vl_processor(folder, tokenizer, hf.Qwen3VLProcessor, 16, hf.Qwen3VLVideoProcessor)
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.2,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_vl_ids(tokenizer))


def _clip() -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "initializer_range": 0.2,
    }


def _llava(folder: Path) -> Any:
    import transformers as hf

    tokenizer = _tokenizer(folder, LLAVA_TOKENS)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    hf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)
    return hf.LlavaConfig(
        vision_config=_clip(),
        text_config={"model_type": "llama", **TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_onevision(folder: Path) -> Any:
    import transformers as hf

    tokenizer = _tokenizer(folder, LLAVA_TOKENS)
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    size = {"height": 28, "width": 28}
    hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)
    image_id, video_id = tokenizer.convert_tokens_to_ids(LLAVA_TOKENS)
    return hf.LlavaOnevisionConfig(
        vision_config={**_clip(), "model_type": "siglip_vision_model"},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=image_id,
        video_token_id=video_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _gemma3(folder: Path) -> Any:
    """Its processor writes two line breaks around an image, its template trims messages, and images attend both ways."""
    import transformers as hf

    backend = _tokenizer(folder, list(GEMMA_TOKENS.values())).backend_tokenizer
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=GEMMA_TOKENS
    )
    template = LLAVA_TEMPLATE.replace("<image>\n", "<start_of_image>").replace("content.text", "content.text | trim")
    images = hf.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    hf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4).save_pretrained(folder)
    begin, end, image = tokenizer.convert_tokens_to_ids(list(GEMMA_TOKENS.values()))
    text = {"model_type": "gemma3_text", **TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}
    return hf.Gemma3Config(
        vision_config={**_clip(), "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=image,
    )


def _qwen2_audio(folder: Path) -> Any:
    import transformers as hf

    tokenizer = _tokenizer(folder, AUDIO_TOKENS)
    mels = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=4)
    hf.Qwen2AudioProcessor(mels, tokenizer).save_pretrained(folder)
    audio = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 16,
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "max_source_positions": 200,
        "initializer_range": 0.2,
    }
    return hf.Qwen2AudioConfig(
        audio_config=audio,
        text_config={"model_type": "qwen2", **TEXT},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
