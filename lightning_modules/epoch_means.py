"""Means over an evaluation, of all its rows on all processes, and of each source.

Shape suffixes: B rows of a batch, R rows of an evaluation, M metrics, 2 total and count.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

RowValues = tuple[Tensor, Tensor]
"""What rows have of a metric: total_B, and count_B, the number of its summands; 0 in a row that it says nothing about."""


class _Batch(NamedTuple):
    """The values of a batch: values_M2B of the metrics with these names, and the source of each row."""

    names: tuple[str, ...]
    sources: tuple[str, ...]
    values_M2B: Tensor


class EpochMeans:
    """Collects what rows have of metrics, and divides once, when the evaluation is over.

    Until then values stay on their device, so that no batch waits for it. Then the processes meet once, and tell each other
    what they have: one of them may lack a metric or a source, and leaves nobody waiting.
    """

    def __init__(self) -> None:
        self._batches: list[_Batch] = []

    def reset(self) -> None:
        """Begins a new evaluation."""
        self._batches = []

    def add(self, values: Mapping[str, RowValues], sources: Sequence[str]) -> None:
        """Adds what the rows of a batch have of some metrics, by name.

        Args:
            values: Totals and counts; the mean of a metric is the sum of its totals divided by the sum of its counts.
            sources: The source of each row.
        """
        values_M2B = torch.stack([torch.stack([total_B.float(), count_B.float()]) for total_B, count_B in values.values()])
        self._batches.append(_Batch(tuple(values), tuple(sources), values_M2B))

    def compute(self, trainer: Trainer) -> dict[str, float]:
        """The mean of each metric that has a count, the same on all processes.

        Returns:
            `<metric>` over all rows, and `<source>/<metric>` where the rows have several sources.
        """
        sums = _gather(self._sums(), trainer)
        sources = {source for source, _ in sums}
        names = dict.fromkeys(name for _, name in sums)
        totals = {name: _add(sums[key] for key in sums if key[1] == name) for name in names}
        if len(sources) > 1:
            totals |= {f"{source}/{name}": pair for (source, name), pair in sums.items() if source}
        return {name: total / count for name, (total, count) in totals.items() if count > 0}

    def _sums(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Total and count by source and metric, on this process."""
        sums: dict[tuple[str, str], tuple[float, float]] = {}
        for names in dict.fromkeys(batch.names for batch in self._batches):
            batches = [batch for batch in self._batches if batch.names == names]
            values_M2R = torch.cat([batch.values_M2B for batch in batches], dim=2).cpu().double()
            source_of_row = [source for batch in batches for source in batch.sources]
            for source in dict.fromkeys(source_of_row):
                is_own_R = torch.tensor([other == source for other in source_of_row])
                for name, (total, count) in zip(names, values_M2R[:, :, is_own_R].sum(2).tolist(), strict=True):
                    sums[source, name] = _add([sums.get((source, name), (0.0, 0.0)), (total, count)])
        return sums


def _add(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    totals, counts = zip(*pairs, strict=True)
    return sum(totals), sum(counts)


def _gather(own: dict[tuple[str, str], tuple[float, float]], trainer: Trainer) -> dict[tuple[str, str], tuple[float, float]]:
    """The sums of all processes together."""
    if trainer.world_size == 1:
        return own
    of_ranks: list[dict[tuple[str, str], tuple[float, float]]] = [{}] * trainer.world_size
    torch.distributed.all_gather_object(of_ranks, own)
    keys = dict.fromkeys(key for sums in of_ranks for key in sums)
    return {key: _add(sums.get(key, (0.0, 0.0)) for sums in of_ranks) for key in keys}
