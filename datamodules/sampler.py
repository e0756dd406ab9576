"""Which rows make which batch: a pure function of seed and epoch, so that a run can go on anywhere.

Shape suffixes: R rows of an epoch, in their order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from datamodules.dataset import RowKey


class RowSampler(Sampler[RowKey]):
    """The rows of an epoch in their order, and the place in it.

    Args:
        num_rows: Rows of the dataset.
        shuffle: A new order each epoch; False: the order of the file.
        seed: Seed of the orders.

    Attributes:
        epoch: The epoch at hand, counted from 0.
        batch: How many of its batches have been handed out.
    """

    def __init__(self, num_rows: int, shuffle: bool, seed: int) -> None:
        self.num_rows = num_rows
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

    def order(self) -> Tensor:
        """Row numbers order_R of the epoch at hand."""
        if not self.shuffle:
            return torch.arange(self.num_rows)
        # a generator of its own: the global one serves the model, and resumes from a checkpoint
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.num_rows, generator=generator)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[RowKey]:
        epoch = self.epoch
        return (RowKey(row, epoch) for row in self.order().tolist())


class GlobalBatches(Sampler[list[RowKey]]):
    """Batches of `batch_size` rows for each rank, cut from one order that all ranks share.

    No row is repeated and none is left out: the last batch of an epoch is smaller, and may be empty on some ranks, but
    all ranks have equally many batches. What one rank gets in a batch of 8, eight ranks get in batches of 1.

    Args:
        sampler: The order; its `batch` says where to begin.
        batch_size: Rows a batch, on each rank.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, sampler: RowSampler, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    @property
    def global_size(self) -> int:
        """Rows of a batch on all ranks together."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        return -(-self.sampler.num_rows // self.global_size)

    def num_rows(self) -> int:
        """Rows of an epoch that this rank gets."""
        full, rest = divmod(self.sampler.num_rows, self.global_size)
        return full * self.batch_size + len(range(self.rank, rest, self.world_size))

    def __iter__(self) -> Iterator[list[RowKey]]:
        epoch, size, order_R = self.sampler.epoch, self.global_size, self.sampler.order()
        for batch in range(self.sampler.batch, len(self)):
            rows_R = order_R[batch * size : (batch + 1) * size][self.rank :: self.world_size]
            yield [RowKey(row, epoch) for row in rows_R.tolist()]
