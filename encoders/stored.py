"""Frozen weights that are stored as narrow floats, and widened where they are used.

Shape suffixes: I input width, O output width.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


def compute_wide(model: nn.Module, layers: Collection[type[nn.Module]] = tuple(_STORED)) -> None:
    """Lets a frozen model compute in float32, in place: weights of linear layers and embeddings stay as they are stored.

    Everything else (norms, biases, convolutions, and layers of other classes) is small and becomes float32.

    Args:
        model: The model, before it gets adapters.
        layers: The classes of layers whose weights stay as they are.
    """
    stored = {p for m in model.modules() if type(m) in layers for p in m.parameters(recurse=False) if _is_narrow(p)}
    stored -= {p for m in model.modules() if type(m) not in layers for p in m.parameters(recurse=False)}  # tied to other layers
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.is_floating_point() and tensor not in stored:
                tensor.data = tensor.data.to(torch.float32)
        if type(module) in layers and not stored.isdisjoint(module.parameters(recurse=False)):
            module.__class__ = _STORED[type(module)]  # the same weights, options and hooks


def _is_narrow(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.is_floating_point() and weight.dtype != torch.float32


def input_type(model: nn.Module) -> torch.dtype:
    """The type in which a model computes: that of its first weight which is not widened at use."""
    layers = (m for m in model.modules() if not isinstance(m, StoredLinear | StoredEmbedding))
    return next(p.dtype for m in layers for p in m.parameters(recurse=False))
