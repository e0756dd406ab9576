"""Tensors that are spread over processes (torch's DTensor), beside those that are not."""

from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from models.flat_layer import FlatLayer


def is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a process holds only its share of a tensor."""
    return isinstance(tensor, DTensor)


def has_shares(layer: nn.Module) -> bool:
    """Whether a process holds only shares of the weights of a layer, gathered while it runs: by torch's FSDPs or DeepSpeed."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(layer, FSDPModule | FlatLayer) or any("ds_tensor" in vars(weight) for weight in layer.parameters())


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if is_spread(tensor) else tensor


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The devices over which a tensor is spread: torch computes with tensors of one mesh at a time. None: it is not spread."""
    return tensor.device_mesh if is_spread(tensor) else None


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; the processes that share it must meet here."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's share of a tensor that each process has whole, cut as `model` is; nothing is sent."""
    if not is_spread(model) or is_spread(tensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


@torch.no_grad()
def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, each of them whole or spread in its own way; all processes get the same.

    Gradients that are not spread are the same on all processes, and count once.
    """
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        key: tuple[DeviceMesh | None, tuple[int, ...]] = None, ()
        if is_spread(gradient):
            cut = tuple(dim for dim, placement in enumerate(gradient.placements) if not placement.is_replicate())
            key = gradient.device_mesh, cut
        groups.setdefault(key, []).append(local(gradient))
    squares = []
    for (mesh, cut), shares in groups.items():
        square = torch.stack([norm.float() for norm in torch._foreach_norm(shares)]).square().sum()
        for dim in cut:
            assert mesh is not None
            dist.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


@torch.no_grad()
def clip_norm(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients down so that `total_norm` is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    That one refuses gradients of which some are spread and others are not.

    Returns:
        The norm before.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = total_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's own 1e-6
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    return norm
