"""Frozen weights stored in fewer bits than they are computed with: narrow floats that are widened at use, or quantised ones.

Shape suffixes: I input width, O output width.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Quantize = Literal["nf4", "int8"]


class StoredLinear(nn.Linear):
    """A frozen linear layer whose weight is cast to the type of its input at each use, and again for the gradient.

    The wide copy lives as long as one product, so that the weights of one layer exist twice at a time. Under autocast it is
    `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return _WideProduct.apply(input, self.weight, self.bias)


class StoredEmbedding(nn.Embedding):
    """A frozen embedding whose vectors are cast to float32 when they have been looked up."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(torch.float32)


class _WideProduct(torch.autograd.Function):
    """x Wᵀ + b of which W is kept in its own type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return grad @ weight_OI.to(grad.dtype), None, None


_STORED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: StoredLinear, nn.Embedding: StoredEmbedding}


def compute_wide(model: nn.Module) -> None:
    """Lets a frozen model compute in float32, in place: weights of linear layers and embeddings stay as they are stored.

    Everything else (norms, biases, convolutions, and layers of other classes) is small and becomes float32.

    Args:
        model: The model, before it gets adapters.
    """
    stored = {p for m in model.modules() if type(m) in _STORED for p in m.parameters(recurse=False) if p.ndim == 2}
    stored -= {p for m in model.modules() if type(m) not in _STORED for p in m.parameters(recurse=False)}  # tied to other layers
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.is_floating_point() and tensor not in stored:
                tensor.data = tensor.data.to(torch.float32)
        if type(module) in _STORED and not stored.isdisjoint(module.parameters(recurse=False)):
            module.__class__ = _STORED[type(module)]  # the same weights, options and hooks


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


def check_quantised(model: nn.Module) -> None:
    """Keeps NF4 layers on a CPU from what they do wrong there (bitsandbytes 0.50).

    For evaluation they would pack their weights into a form that has no gradients. Rows whose weights do not come in whole blocks
    of 64 are decoded with the scales of others.

    Raises:
        ValueError: There are such rows.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
            if module.in_features % 64:
                raise ValueError(
                    f"language_model.quantize nf4: {name} is {module.in_features} wide, and on a CPU bitsandbytes decodes only "
                    "multiples of 64 rightly: take int8, or a GPU"
                )


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: NF4 packs two into a byte."""
    state = vars(parameter).get("quant_state")  # of bitsandbytes
    return parameter.numel() if state is None else math.prod(state.shape)


def stored_type(parameter: nn.Parameter) -> str:
    """How the weights of a parameter are stored, in a word: `float32`, `nf4`."""
    state = vars(parameter).get("quant_state")
    return str(parameter.dtype).removeprefix("torch.") if state is None else state.quant_type
