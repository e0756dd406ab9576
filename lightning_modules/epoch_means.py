"""Means over an evaluation, of all its rows on all processes."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class EpochMeans:
    """Sums and counts by name, and their quotient when the epoch is over.

    The processes meet once an epoch and for all names alike, so that one that has, say, no picture among its rows does
    not leave the others waiting.

    Args:
        names: What there are means of.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._sums = dict.fromkeys(names, (0.0, 0.0))

    def reset(self) -> None:
        """Begins a new epoch."""
        self._sums = dict.fromkeys(self._sums, (0.0, 0.0))

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Adds what a batch has of a name: a sum, and the number of its summands."""
        before = self._sums[name]
        self._sums[name] = before[0] + float(total), before[1] + float(count)

    def compute(self, trainer: Trainer) -> dict[str, Tensor]:
        """The mean of each name that anything was added to, the same on all processes."""
        own = torch.tensor(list(self._sums.values()), device=trainer.strategy.root_device)
        sums = trainer.strategy.reduce(own, reduce_op="sum")
        return {name: total / count for name, (total, count) in zip(self._sums, sums, strict=True) if count > 0}
