"""The language model: any causal LM of transformers, with adapters, without its logits.

Shape suffixes: B rows, T positions, D hidden size, V vocabulary.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from encoders.base import DTYPES, DType, Part
from encoders.hf import misfits
from encoders.stored import compute_wide
from encoders.tuning import Tune
from models.attention_blocks import use_blocks
from models.attention_mask import attention_inputs
from models.branches import can_branch, can_pack
from models.generation import Generation, continue_prompts
from models.lean import make_lean
from models.spread import has_shares
from models.stored import Quantize, quantization, settle_quantised

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class LanguageModel(Part):
    """A causal language model of transformers, from the hub or a folder.

    Args:
        name_or_path: Name on the hub, or a folder with `config.json`.
        pretrained: Load the weights; False draws random ones for the configuration, for tests.
        dtype: Type of the frozen weights, in which they compute where there is no autocast; what trains is float32.
        compute_dtype: `float32` computes in it with frozen weights that stay in `dtype`, each widened while it is used: the
            numbers of `dtype float32` in half of its memory, of a checkpoint that is bfloat16.
        quantize: Store the frozen linear layers, but not the head, in fewer bits, by bitsandbytes, beside adapters: `nf4` is
            QLoRA with double quantisation, 4.1 bits a weight, `int8` LLM.int8(). They compute in `compute_dtype`, or `dtype`.
        attn_implementation: Attention kernel, as transformers names it; None: sdpa where the model has it, else eager.
        trust_remote_code: Run Python code that comes with the checkpoint. Read that code first.
        tune: What is trained, LoRA on q_proj and v_proj by default.
    """

    def __init__(
        self,
        name_or_path: str,
        pretrained: bool = True,
        dtype: DType = "float32",
        compute_dtype: Literal["float32"] | None = None,
        quantize: Quantize | None = None,
        attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = None,
        trust_remote_code: bool = False,
        tune: Tune = Tune(mode="lora"),
    ) -> None:
        super().__init__(tune)
        self.name_or_path = name_or_path
        self.pretrained = pretrained
        self.dtype, self.compute_dtype, self.quantize = dtype, compute_dtype, quantize
        self._check_quantize()
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code

    def _check_quantize(self) -> None:
        if self.quantize is None:
            return
        for is_so, problem in (
            (self.tune.mode == "full", "tune.mode full would train them: set tune.mode to lora"),
            (self.tune.lora.init == "pissa", "tune.lora.init pissa changes them: set it to null"),
            (not self.pretrained, "pretrained false draws them, and no checkpoint can hold them so: set quantize to null"),
        ):
            if is_so:
                raise ValueError(f"language_model.quantize {self.quantize} stores frozen weights in fewer bits, but {problem}")

    @property
    def has_source(self) -> bool:
        """Whether the weights come from the hub or a folder."""
        return self.pretrained

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The configuration alone, without weights.

        Raises:
            ValueError: There is no such folder, or the hub has no such model or cannot be reached.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.name_or_path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(_not_found(self.name_or_path, error)) from error

    @property
    def hidden_size(self) -> int:
        """Width D of the embeddings."""
        return self.config.get_text_config().hidden_size

    def build(self) -> None:
        """Makes the weights, then freezes, adapts or frees them.

        Raises:
            ValueError: There is no such model, its weights are not whole, or its head is of a kind that is not known here.
        """
        from transformers import AutoModelForCausalLM, GenerationConfig

        # what trains is float32, and a detour would round float32 checkpoints
        self.model = self._load(AutoModelForCausalLM, torch.float32 if self.tune.mode == "full" else DTYPES[self.dtype])
        self.model.generation_config = GenerationConfig()  # `generate` would fill from the checkpoint's own what we leave open
        make_lean(self.model)
        use_blocks(self.model)
        if self.compute_dtype is not None:
            compute_wide(self.model)
        self.apply_tune(self.model)
        self._check_head()

    def _load(self, kind: Any, dtype: torch.dtype) -> "PreTrainedModel":
        """The weights, by one of transformers' auto classes."""
        from safetensors import SafetensorError

        options: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }
        if self.quantize is not None:
            compute_dtype = DTYPES[self.compute_dtype or self.dtype]
            options["quantization_config"] = quantization(self.quantize, compute_dtype, self._kept_whole(kind))
        try:
            if not self.pretrained:
                return kind.from_config(self.config, **options)
            loaded: Any = kind.from_pretrained(
                self.name_or_path, config=self.config, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(_not_found(self.name_or_path, error)) from error
        model, report = loaded
        if self.quantize is not None:
            settle_quantised(model)
        if wrong := misfits(report):
            raise ValueError(
                f"language_model.name_or_path: the weights in {self.name_or_path} do not fit its config.json "
                f"({type(model).__name__}): {len(wrong)} are missing or have another shape, such as {wrong[0]}. "
                "Give a folder whose weights are whole"
            )
        return model

    def _kept_whole(self, kind: Any) -> list[str] | None:
        """Names of modules that are not quantised; None: the head."""
        return None

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The layers of the decoder, in order.

        Raises:
            ValueError: The model has no list of as many modules as its config has layers, or more than one.
        """
        num_layers = self.config.get_text_config().num_hidden_layers
        found: list[nn.ModuleList] = []
        inside: set[nn.Module] = set()  # lists within the layers, such as experts, may happen to be as long
        for module in self.model.get_decoder().modules():
            if isinstance(module, nn.ModuleList) and len(module) == num_layers and module not in inside:
                found.append(module)
                inside.update(module.modules())
        if len(found) != 1:
            raise ValueError(
                f"{self.name_or_path} ({type(self.model).__name__}) has {len(found)} lists of {num_layers} modules, expected "
                "one, the layers of its decoder: subclass LanguageModel and override `decoder_layers`"
            )
        return found[0]

    @property
    def head(self) -> nn.Module:
        """The layer that makes logits_BTV of hidden_BTD, adapters included."""
        return self.model.get_output_embeddings()

    @property
    def softcap(self) -> float | None:
        """Logits are c·tanh(logits / c) for this c (Gemma 2), or None."""
        return self.config.get_text_config().to_dict().get("final_logit_softcapping")

    @property
    def logit_scale(self) -> float:
        """Logits are multiplied by this: `logit_scale` (Cohere), 1 / `logits_scaling` (Granite)."""
        config = self.config.get_text_config().to_dict()
        return (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Embeds token ids: embeddings_BTD."""
        return self.model.get_input_embeddings()(tokens_BT)

    @cached_property
    def takes_branches(self) -> bool:
        """Whether answers that share their prompt give what each gives alone; see `can_branch`."""
        return can_branch(self)

    @cached_property
    def takes_packs(self) -> bool:
        """Whether samples that share a row give what each gives alone; see `can_pack`."""
        return can_pack(self)

    def forward(
        self, embeddings_BTD: Tensor, segments_BT: Tensor, positions_BT: Tensor, branches_BT: Tensor | None = None
    ) -> Tensor:
        """Last hidden states, after the final norm: what the head takes.

        Args:
            embeddings_BTD: Embedded tokens, media features written in.
            segments_BT: 0 where a position is padding, else the number of the sample; several in a row where `takes_packs`.
            positions_BT: Position of each token in its sample.
            branches_BT: The answer that a token belongs to; None: none. Several in a sample where `takes_branches`.
        """
        assert segments_BT.max() <= 1 or self.takes_packs, "samples that share a row would see each other"
        attention = attention_inputs(self.model.config, segments_BT, branches_BT, positions_BT, embeddings_BTD.dtype)
        output = self.model.base_model(inputs_embeds=embeddings_BTD, position_ids=positions_BT, use_cache=False, **attention)
        return output.last_hidden_state

    @torch.no_grad()
    def generate(
        self, embeddings_BTD: Tensor, segments_BT: Tensor, options: Generation, eos_ids: Iterable[int], pad_id: int
    ) -> Tensor:
        """Continues left-padded prompts with a key-value cache: the new tokens, (B, at most max_new_tokens).

        Args:
            embeddings_BTD: Embedded prompts, padded on the left.
            segments_BT: 0 where a position is padding.
            options: How to decode.
            eos_ids: Tokens that end an answer.
            pad_id: Fills answers that ended early.
        """
        prompts = {"inputs_embeds": embeddings_BTD}
        return continue_prompts(self.model, prompts, segments_BT, options, eos_ids, pad_id, self.is_shared)

    @property
    def is_shared(self) -> bool:
        """Whether its weights are spread over processes, which must run it equally often."""
        return has_shares(self.decoder_layers[0])

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuses a model whose logits are more than its head on its last hidden states."""
        weight = next(self.model.get_input_embeddings().parameters())
        if weight.is_meta:
            return
        was_training = self.model.training
        self.model.eval()
        tokens_BT = torch.tensor([[1, 2]], device=weight.device) % weight.shape[0]
        logits_BTV = self.model(input_ids=tokens_BT, use_cache=False).logits.float()
        hidden_BTD = self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        ours_BTV = self.head(hidden_BTD).float() * self.logit_scale
        if self.softcap is not None:
            ours_BTV = self.softcap * torch.tanh(ours_BTV / self.softcap)
        self.model.train(was_training)
        tolerance = 1e-3 if self.dtype == "float32" else 5e-2
        error = ((logits_BTV - ours_BTV).abs().max() / logits_BTV.abs().max().clamp_min(1e-6)).item()
        if not error <= tolerance:
            raise ValueError(
                f"{self.name_or_path} ({type(self.model).__name__}) makes its logits of its last hidden states in a way "
                f"that LanguageModel does not know (relative difference {error:.1e}): its loss would be wrong. "
                "Subclass LanguageModel and override `head`, `softcap` or `logit_scale`."
            )


def _not_found(name_or_path: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0]
    if Path(name_or_path).is_dir():
        files = ", ".join(sorted(p.name for p in Path(name_or_path).iterdir())[:8]) or "nothing"
        return (
            f"language_model.name_or_path: the folder {name_or_path} cannot be read as a causal language model ({first_line}). "
            f"It holds {files}; expected config.json and model.safetensors."
        )
    return (
        f"language_model.name_or_path: {name_or_path!r} is no folder here, and was not found on the hub or in its cache "
        f"({first_line}). Give a folder with config.json and model.safetensors, or check the name and the network."
    )
