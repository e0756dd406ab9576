"""Frozen weights of a language model that are quantised, by bitsandbytes."""

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from models.flat_layer import shape_of

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Quantize = Literal["nf4", "int8"]


def quantization(kind: Quantize, compute_dtype: torch.dtype, whole: Sequence[str] | None) -> "BitsAndBytesConfig":
    """How transformers quantises the linear layers that it loads: NF4 with double quantisation (QLoRA, Dettmers et al. 2023,
    arXiv 2305.14314), or the 8 bits of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).

    Args:
        kind: Which of the two.
        compute_dtype: Type to which NF4 weights are decoded for a product.
        whole: Names of modules that are not quantised; None: the head.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"language_model.quantize {kind} needs bitsandbytes, which is not installed: pip install 'bitsandbytes>=0.50,<0.51', "
            "or leave quantize out"
        )
    options: dict[str, Any] = {"llm_int8_skip_modules": None if whole is None else list(whole)}
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        **options,
    )


def settle_quantised(model: nn.Module) -> None:
    """Lets go of the file of a model that was quantised as it was loaded, and keeps NF4 layers on a CPU from what they do wrong.

    Weights that are whole are views of the checkpoint's file, all of which would stay mapped: they are copied. NF4 layers
    of bitsandbytes 0.50 on a CPU would, for evaluation, pack their weights into a form that has no gradients. Rows whose weights
    do not come in whole blocks of 64 are decoded with the scales of others there.

    Raises:
        ValueError: There are such rows.
    """
    from bitsandbytes.nn import Linear4bit

    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.clone()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
            if module.in_features % 64:
                raise ValueError(
                    f"language_model.quantize nf4: {name} is {module.in_features} wide, and on a CPU bitsandbytes decodes only "
                    "multiples of 64 rightly: take int8, or a GPU"
                )


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: NF4 packs two into a byte, and of a share there may be none here."""
    state = vars(parameter).get("quant_state")  # of bitsandbytes
    number: int = vars(parameter).get("ds_numel", shape_of(parameter).numel())  # of DeepSpeed's stage 3
    return number if state is None else math.prod(state.shape)


def stored_type(parameter: nn.Parameter) -> str:
    """How the weights of a parameter are stored, in a word: `float32`, `nf4`."""
    state = vars(parameter).get("quant_state")
    return str(parameter.dtype).removeprefix("torch.") if state is None else state.quant_type
