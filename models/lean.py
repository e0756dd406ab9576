"""Blocks of decoders as single differentiable operations, with the least memory traffic; the numbers stay the same.

A block of the Llama family keeps for the backward pass some ten tensors of the width of its feed-forward layer and as many of its
norms. Here each block is one operation that keeps its inputs alone and computes the rest again, which costs next to nothing.

Shape suffixes: D width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_GATED_LAYERS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x) (SwiGLU, Shazeer 2020, arXiv 2002.05202), around the layers of another module.

    Args:
        gate_proj: Into the gate.
        up_proj: Into what is gated.
        down_proj: Back to the width of the model.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(_GatedSiLU.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


class RMSNorm(nn.Module):
    """x / sqrt(mean x² + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467), in float32, as Llama rounds it.

    Args:
        weight: weight_D.
        eps: Keeps the root from 0.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _RMSNorm.apply(hidden_states, self.weight, self.eps)


@torch.no_grad()
def make_lean(model: nn.Module) -> int:
    """Puts `GatedMLP` and `RMSNorm` in the place of the modules of a model that compute the same.

    A module is known by its parts, and then asked: only one that gives the same for random input is replaced. The layers, which
    may be quantised, their names and their weights stay what they are.

    Args:
        model: A model of transformers.

    Returns:
        How many modules were replaced.
    """
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    verdicts: dict[type[nn.Module], bool] = {}  # of one class one is asked
    replaced = 0
    for parent, name, child in found:
        lean = _lean(child)
        if lean is None:
            continue
        if type(child) not in verdicts:
            verdicts[type(child)] = _computes_the_same(child)
        if verdicts[type(child)]:
            lean.train(child.training)
            parent.register_module(name, lean)
            replaced += 1
    return replaced


def _lean(module: nn.Module) -> nn.Module | None:
    """What might take the place of a module."""
    children, weights = dict(module.named_children()), dict(module.named_parameters(recurse=False))
    if children.keys() == _GATED_LAYERS and not weights and not any(True for _ in children["act_fn"].parameters()):
        return GatedMLP(children["gate_proj"], children["up_proj"], children["down_proj"])
    eps = vars(module).get("variance_epsilon")
    if not children and weights.keys() == {"weight"} and isinstance(eps, float) and not any(True for _ in module.buffers()):
        return RMSNorm(weights["weight"], eps)
    return None


def _computes_the_same(module: nn.Module) -> bool:
    """Tries a small copy of a module, with weights of its own: those of the module may be large, packed, or not there."""
    if any(_has_hooks(part) for part in module.modules()):
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    small: dict[int, Any] = {}  # what takes the place of what in the copy
    weight = next(module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    for child in module.children():
        if any(True for _ in child.parameters()):
            small[id(child)] = nn.Linear(8, 8, bias=False, device="cpu", dtype=dtype)
            small[id(child)].weight.copy_(draw(8, 8))
    if not small:
        small[id(weight)] = nn.Parameter(draw(8).to(dtype))
    with torch.device("cpu"):
        copied = copy.deepcopy(module, small)
    lean = _lean(copied)
    assert lean is not None
    x_1D = draw(3, 8).to(dtype)
    ours, theirs = lean(x_1D), copied(x_1D)
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) * up, of which only the two are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.mul(grad, up)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, nn.functional.silu(gate).mul_(grad)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one number a token; the normalised input is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return weight_D * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, scale = ctx.saved_tensors
        unit = x.float() * scale
        grad_weight = (grad.float() * unit).flatten(0, -2).sum(0).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_unit = grad.float() * weight_D.float()
            inner = (grad_unit * unit).mean(-1, keepdim=True)
            grad_x = grad_unit.sub_(unit.mul_(inner)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None
