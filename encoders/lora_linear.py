"""LoRA on a plain linear layer as one differentiable operation, with the least memory traffic.

Shape suffixes: R rows of the input, I input width, O output width, K rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from encoders.tuning import is_plain


def lora_linear(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> "LoRALinear | None":
    """What PEFT puts in the place of a linear layer; None leaves the layer to PEFT, as one that is quantised.

    For `LoraConfig._register_custom_module`, PEFT's own way to name another class for a kind of layer.
    """
    base = target.get_base_layer() if isinstance(target, Linear) else target
    return LoRALinear(target, adapter_name, config=config, **kwargs) if type(base) is nn.Linear else None


class LoRALinear(Linear):
    """PEFT's LoRA layer, whose plain case is one operation.

    PEFT computes x Wᵀ + s (x Aᵀ) Bᵀ by a chain of operations, of which three make another tensor as large as the output, forward,
    and two as large, backward. Here the update is added in place, and the factor s applied at the narrow side. Whatever is not
    the plain case (dropout, DoRA, several adapters, other types, autocast, weights that are trained or sharded) is PEFT's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self._plain_adapter(x) if not args and not kwargs else None
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base, narrow, wide = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
        return _LoRALinear.apply(x, base.weight, base.bias, narrow.weight, wide.weight, float(self.scaling[adapter]))

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one adapter that is at work in its plain form, or None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1 or torch.is_autocast_enabled(x.device.type):
            return None
        (adapter,) = self.active_adapters
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_bias[adapter]:
            return None
        if self.training and not isinstance(self.lora_dropout[adapter], nn.Identity):
            return None
        weights: tuple[Any, ...] = (self.base_layer.weight, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        are_plain = all(is_plain(weight) and weight.dtype == x.dtype for weight in weights)
        return adapter if are_plain and not weights[0].requires_grad else None


class _LoRALinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv 2106.09685, eq. 3), with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_KI: Tensor, b_OK: Tensor, scaling: float
    ) -> Tensor:
        x_RI = x.reshape(-1, x.shape[-1])
        z_RK = x_RI @ a_KI.T
        y_RO = F.linear(x_RI, weight_OI, bias_O).addmm_(z_RK, b_OK.T, alpha=scaling)
        ctx.save_for_backward(x_RI, weight_OI, a_KI, b_OK, z_RK)
        ctx.scaling = scaling
        return y_RO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_RI, weight_OI, a_KI, b_OK, z_RK = ctx.saved_tensors
        grad_RO = grad.reshape(-1, grad.shape[-1])
        grad_z_RK = (grad_RO @ b_OK).mul_(ctx.scaling)
        grad_x = grad_a_KI = grad_b_OK = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_RO, weight_OI).addmm_(grad_z_RK, a_KI).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            grad_a_KI = grad_z_RK.T @ x_RI
        if ctx.needs_input_grad[4]:
            grad_b_OK = (grad_RO.T @ z_RK).mul_(ctx.scaling)
        return grad_x, None, None, grad_a_KI, grad_b_OK, None
