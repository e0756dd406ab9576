"""A decoder layer whose weights torch's first FSDP keeps in flat shards, and where the share of a weight is in it."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatLayer(nn.Module):
    """A decoder layer as its model sees it: its modules and weights have their names, and a wrapper of torch runs it.

    Args:
        layer: The layer.
        wrapped: The same in the wrapper, which gathers the weights while the layer runs.
    """

    def __init__(self, layer: nn.Module, wrapped: nn.Module) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = layer._modules, layer._parameters, layer._buffers
        self._runs = layer, wrapped  # in a tuple: no children

        self.root: tuple[nn.Module, ...] = ()
        """Of the first layer the outermost wrapper, which runs all."""

    def __getattr__(self, name: str) -> Any:
        """What a model reads of its layers, such as the kind of their attention."""
        return getattr(vars(self)["_runs"][0], name)

    def train(self, mode: bool = True) -> Self:
        self._runs[0].train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._runs[1](*args, **kwargs)


@dataclass(frozen=True)
class Cut:
    """What a process has of a weight that is in flat shards: some of its values in one row, or none.

    Args:
        shape: Of the whole weight.
        start: The first of the values that are here.
    """

    shape: torch.Size
    start: int

    def whole(self, values: Tensor) -> Tensor:
        """All values, of which this process has `values`; all processes must meet here."""
        flat = values.new_zeros(self.shape.numel())
        flat[self.start : self.start + values.numel()] = values
        dist.all_reduce(flat)
        return flat.view(self.shape)

    def own(self, whole: Tensor, number: int) -> Tensor:
        """The values of a tensor like the weight that belong here, so many."""
        return whole.flatten()[self.start : self.start + number].clone()


def cut_of(weight: Tensor) -> Cut | None:
    """How a weight is cut; None: it is whole, or spread in another way."""
    return vars(weight).get("cut")


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of a weight, of which this process may have but some values."""
    cut = cut_of(weight)
    return weight.shape if cut is None else cut.shape
