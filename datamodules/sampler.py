"""Which rows make which batch: a pure function of seed and epoch, so that a run can go on anywhere.

Shape suffixes: R rows of an epoch, in their order; 2 row and epoch, as in `RowKey`; U units.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from datamodules.batching import Batching
from datamodules.packing import Packs, RowSizes
from datamodules.portion import Portion, generator
from datamodules.row_dataset import RowKey

log = logging.getLogger(__name__)

_MOST_PLANNED = 16
"""Epochs that are packed ahead, where they need different numbers of packs, to see how many."""
_ROWS_PLANNED = 100_000
"""So many rows are packed ahead at most, of epochs in random order: of more rows the number of packs hardly changes."""


class RowSampler(Sampler[RowKey]):
    """The rows of an epoch in their order, and the place in it.

    Args:
        portions: What each epoch takes of the sources, in the order in which the dataset has them.
        shuffle: A new order each epoch; False: the order of the file, and of several files each spread evenly over the epoch, so
            that the first batches are a look at all of them.
        seed: Seed of the orders.

    Attributes:
        epoch: The epoch at hand, counted from 0.
        batch: How many of its batches have been handed out.
    """

    def __init__(self, portions: Sequence[Portion], shuffle: bool, seed: int) -> None:
        self.portions = tuple(portions)
        self.shuffle = shuffle
        self.seed = seed
        self.go_to(0, 0)

    def go_to(self, epoch: int, batch: int) -> None:
        """Sets the place at which `begin` begins."""
        self.epoch = epoch
        self.batch = batch
        self._begun = False

    def set_epoch(self, epoch: int) -> None:
        """Goes to the first batch of another epoch; the place in the epoch at hand stays."""
        if epoch != self.epoch:
            self.go_to(epoch, 0)

    def begin(self, num_batches: int) -> None:
        """Begins at the place that is set; where that has been done, or no batch is left there, with the next epoch.

        Args:
            num_batches: Batches of an epoch.
        """
        if self._begun or self.batch >= num_batches:
            self.go_to(self.epoch + 1, 0)
        self._begun = True

    def order(self, epoch: int | None = None) -> Tensor:
        """Rows of the dataset, and the pass that each of them belongs to: keys_R2 of an epoch; None: of the one at hand."""
        epoch = self.epoch if epoch is None else epoch
        starts = [sum(portion.num_rows for portion in self.portions[:place]) for place in range(len(self.portions))]
        keys_R2 = torch.cat(
            [
                portion.rows(epoch, self.shuffle) + torch.tensor([start, 0])
                for portion, start in zip(self.portions, starts, strict=True)
            ]
        )
        if self.shuffle:
            # a generator of its own: the global one serves the model, and resumes from a checkpoint
            return keys_R2[torch.randperm(len(keys_R2), generator=generator(self.seed, epoch))]
        sizes = [portion.num_rows_an_epoch for portion in self.portions]
        return keys_R2[torch.cat([(torch.arange(size) + 0.5) / size for size in sizes]).argsort(stable=True)]

    def most(self, values_R: np.ndarray) -> float:
        """What values of the rows of an epoch add up to at most, as good as certainly (4 standard deviations above the mean).

        Args:
            values_R: Of the rows of the dataset.
        """
        ends = np.cumsum([portion.num_rows for portion in self.portions])
        parts = zip(self.portions, np.split(values_R, ends[:-1]), strict=True)
        means, variances = zip(*(portion.expected(own_R, self.shuffle) for portion, own_R in parts), strict=True)
        return sum(means) + 4 * math.sqrt(sum(variances))

    @property
    def cycle(self) -> int:
        """After so many epochs the same rows come again, unless they are shuffled; 1 where they are."""
        rows = [] if self.shuffle else [(portion.num_rows, portion.num_rows_an_epoch) for portion in self.portions]
        return math.lcm(*(num_rows // math.gcd(num_rows, taken) for num_rows, taken in rows))

    def __len__(self) -> int:
        return sum(portion.num_rows_an_epoch for portion in self.portions)

    def __iter__(self) -> Iterator[RowKey]:
        return (RowKey(row, epoch) for row, epoch in self.order().tolist())


class GlobalBatches(Sampler[list[RowKey]]):
    """Batches of `batch_size` units for each rank, cut from one order that all ranks share; a unit is a row, or see `Batching`.

    No row is repeated and none is left out: the last batch of an epoch is smaller, and may be empty on some ranks, but
    all ranks have equally many batches. What one rank gets in a batch of 8, eight ranks get in batches of 1, and one rank in 8
    batches of 1 that an optimizer step accumulates: the units of a step are the same.

    Each epoch has as many batches as the others, since a trainer asks once, and the schedule of the learning rate with it. Where
    rows are packed, each has as many packs: a few more than its rows need, so that they suffice in an epoch with longer rows;
    where fewer would do, some are half full, and none is empty.

    Args:
        sampler: The order; its `batch` says where to begin.
        batch_size: Units a batch, on each rank.
        rank: This process.
        world_size: Number of processes.
        batching: What a unit is.
        sizes: Gives the sizes of all rows of the dataset; asked where units are not rows.
        batches_a_step: Batches that an optimizer step accumulates.
    """

    def __init__(
        self,
        sampler: RowSampler,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        batching: Batching = Batching(),  # it is frozen
        sizes: Callable[[], RowSizes] | None = None,
        batches_a_step: int = 1,
    ) -> None:
        self.sampler = sampler
        self.batch_size = 1 if batching.kind == "padded" else batch_size
        self.rank = rank
        self.world_size = world_size
        self.batching = batching
        self.batches_a_step = batches_a_step
        self._sizes = sizes
        self._units: tuple[int, Units] | None = None

    @property
    def global_size(self) -> int:
        """Units of a batch on all ranks together."""
        return self.batch_size * self.world_size

    @property
    def step_size(self) -> int:
        """Units of an optimizer step."""
        return self.global_size * self.batches_a_step

    @cached_property
    def num_units(self) -> int:
        """Units of each epoch."""
        if self.batching.kind == "rows":
            return len(self.sampler)
        needed, reserve = len(self._first_packs), 0
        if self.sampler.shuffle and self.batching.max_encoded is not None:
            # how much packs leave empty depends on which media meet: by about the root of their number
            for epoch in range(1, min(_ROWS_PLANNED // len(self.sampler), _MOST_PLANNED)):
                needed = max(needed, len(self._packs(epoch)))
            reserve = 1 + math.isqrt(needed) // 4
        shares_R = self.batching.shares(self._all_sizes())
        in_a_unit = float(shares_R[self.sampler.order(0)[:, 0].numpy()].sum()) / needed
        for epoch in range(1, min(self.sampler.cycle, _MOST_PLANNED)):
            needed = max(needed, len(self._packs(epoch)))
        # the last term is for what windows of other rows leave empty
        most = math.ceil(self.sampler.most(shares_R) / in_a_unit - 1e-6) + needed // 500 + reserve
        return min(max(most, needed), len(self.sampler))

    @cached_property
    def _first_packs(self) -> Packs:
        return self._packs(0)

    def _packs(self, epoch: int, most: int | None = None) -> Packs:
        return self.batching.packs(self._all_sizes().take(self.sampler.order(epoch)[:, 0].numpy()), most)

    def __len__(self) -> int:
        return -(-self.num_units // self.global_size)

    def batch_behind(self, num_units: int) -> int:
        """The number of the batch that begins behind so many units of an epoch.

        Raises:
            ValueError: None does.
        """
        if num_units % self.global_size and num_units < self.num_units:
            raise ValueError(
                f"the checkpoint was written after {num_units} rows (or packs) of an epoch, which is in the middle of a batch of "
                f"{self.global_size} (batch_size x processes): go on with the batch_size and processes that it had"
            )
        return min(-(-num_units // self.global_size), len(self))

    def own_rows(self, num_batches: int) -> list[Tensor]:
        """Which rows of each source this rank gets in the first batches of the epoch at hand, by their number in the source."""
        num_rows = [portion.num_rows for portion in self.sampler.portions]
        units = self._plan(self.sampler.epoch)
        keys = [keys_R2 for batch in range(num_batches) for keys_R2 in self._own(units, batch)]
        rows_R = torch.cat(keys)[:, 0] if keys else torch.empty(0, dtype=torch.long)
        source_R = torch.bucketize(rows_R.contiguous(), torch.tensor(num_rows).cumsum(0), right=True)
        return [rows_R[source_R == source] - sum(num_rows[:source]) for source in range(len(num_rows))]

    def __iter__(self) -> Iterator[list[RowKey]]:
        units = self._plan(self.sampler.epoch)
        is_packed = self.batching.kind == "packed"
        for batch in range(self.sampler.batch, len(self)):
            yield [
                RowKey(row, epoch, slot if is_packed else None)
                for slot, keys_R2 in enumerate(self._own(units, batch))
                for row, epoch in keys_R2.tolist()
            ]

    def _own(self, units: "Units", batch: int) -> list[Tensor]:
        """The units of a batch that this rank gets."""
        places = range(batch * self.global_size + self.rank, min((batch + 1) * self.global_size, self.num_units), self.world_size)
        # place i is unit i; were there more units than places, they would be spread over all of them
        num = len(units.ends_U)
        return [
            units.keys(unit)
            for place in places
            for unit in range(place * num // self.num_units, (place + 1) * num // self.num_units)
        ]

    def _plan(self, epoch: int) -> "Units":
        if self._units is None or self._units[0] != epoch:
            keys_R2 = self.sampler.order(epoch)
            ends_U = torch.arange(1, len(keys_R2) + 1)
            if self.batching.kind != "rows":
                sizes, num_units = self._all_sizes().take(keys_R2[:, 0].numpy()), self.num_units
                packs = self._first_packs if epoch == 0 else self._packs(epoch, num_units)
                seed = self.sampler.seed * 1_000_003 + epoch
                packs = self.batching.units(packs, sizes, num_units, self.step_size, seed)
                keys_R2, ends_U = keys_R2[torch.from_numpy(packs.rows_R)], torch.from_numpy(packs.ends_P)
                if len(ends_U) > num_units:
                    log.warning("epoch %d needs %d packs and has batches for %d: some hold more", epoch, len(ends_U), num_units)
            self._units = epoch, Units(keys_R2, ends_U)
        return self._units[1]

    def _all_sizes(self) -> RowSizes:
        assert self._sizes is not None, "units of several rows are made of their sizes"
        return self._sizes()


class Units(NamedTuple):
    """Rows in the order of their units: `keys_R2`, and where each unit ends."""

    keys_R2: Tensor
    ends_U: Tensor

    def keys(self, unit: int) -> Tensor:
        """The rows of a unit."""
        return self.keys_R2[int(self.ends_U[unit - 1]) if unit else 0 : int(self.ends_U[unit])]
