"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): blocks keep their input, and compute the rest again backward."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """A block that is computed again for its gradients, with the same random numbers; without autograd it is the block itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward
        return checkpoint(run, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else run(*args, **kwargs)


def recompute_blocks(module: nn.Module, part: str, but: Collection[str] = ()) -> int:
    """Makes the blocks of a module `Recomputed`, in place: they keep their names, weights and hooks.

    Args:
        module: The weights of a part.
        part: Name of the part, for the error.
        but: Names of modules within it that are left alone.

    Returns:
        How many blocks there are.

    Raises:
        ValueError: It has no blocks, or some with batch norms that train.
    """
    found = list(_blocks(module, "", set(but)))
    if not found:
        raise ValueError(
            f"{part}: tune.activation_checkpointing is on, but there is no stack of blocks to compute again: set it to false"
        )
    for block in found:
        if any(isinstance(inner, _BatchNorm) and inner.weight.requires_grad for inner in block.modules()):
            raise ValueError(
                f"{part}: tune.activation_checkpointing would update the running statistics of its batch norms twice a step: set "
                "it to false, or tune.mode to lora"
            )
        # another class of the same object, as torch's own fully_shard does: a wrapper would change the names of the weights
        block.__class__ = type(f"Recomputed{type(block).__name__}", (Recomputed, type(block)), {})
    return len(found)


def _blocks(module: nn.Module, name: str, but: Collection[str]) -> Iterator[nn.Module]:
    """The elements of the outermost lists of modules that are more than single layers."""
    elements = list(module.children())
    is_list = isinstance(module, nn.ModuleList | nn.Sequential) and not any(f"{name}{i}" in but for i in range(len(elements)))
    if is_list and elements and all(any(True for _ in element.children()) for element in elements):
        yield from elements
        return
    for own, child in module.named_children():
        if f"{name}{own}" not in but:
            yield from _blocks(child, f"{name}{own}.", but)
