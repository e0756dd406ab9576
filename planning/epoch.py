"""What an epoch is made of, from the sizes of its rows: tokens, batches, steps, and the batches that take the most memory.

Shape suffixes: R rows.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jsonargparse import Namespace

from datamodules.loading import RowDataModule
from datamodules.packing import RowSizes
from datamodules.row_dataset import RowDataset, RowKey
from datamodules.sampler import GlobalBatches


@dataclass(frozen=True)
class PlannedBatch:
    """A batch of a process.

    Args:
        keys: Its rows.
        places: Tokens with padding.
        tokens: Tokens without.
        encoded: Tokens that go through encoders.
    """

    keys: tuple[RowKey, ...]
    places: int
    tokens: int
    encoded: int


@dataclass(frozen=True)
class Epoch:
    """The first epoch.

    Args:
        rows: Its rows.
        unusable: Rows of the data that will be skipped.
        tokens: Of all its rows.
        places: Tokens with padding.
        longest: Tokens of the longest row.
        batches: On each process.
        steps: Of the optimizer.
        total_steps: Of all epochs that the trainer is to run; None: they do not end.
        largest: The batches that take the most places, the most first, and the one with the most media.
    """

    rows: int
    unusable: int
    tokens: int
    places: int
    longest: int
    batches: int
    steps: int
    total_steps: int | None
    largest: tuple[PlannedBatch, ...]
    most_encoded: PlannedBatch


def open_rows(datamodule: RowDataModule) -> RowDataset:
    """The training rows, of which, unlike for a fit, none is tried out."""
    datamodule.train_dataset = datamodule.dataset("train", datamodule.held_out_rows()[0])
    return datamodule.train_dataset


def plan_epoch(datamodule: RowDataModule, trainer: Namespace, replicas: int, num_largest: int = 3) -> Epoch:
    """Plans the first epoch of a data module whose rows are open; media are known from their headers.

    Args:
        datamodule: The data module.
        trainer: The options of the trainer.
        replicas: Processes that read rows of their own.
        num_largest: So many of the largest batches are kept.

    Raises:
        ValueError: No row can be used.
    """
    loader = datamodule.train_dataloader()
    sizes = loader.sizes()
    if not sizes.tokens_R.any():
        raise ValueError("no row of the training data can be used: `python train.py inspect --bad` says why")
    accumulated = trainer.get("accumulate_grad_batches") or 1
    every = GlobalBatches(loader.rows, datamodule.batch_size, 0, replicas, datamodule.batching, loader.sizes, accumulated)
    num_of_rank = len(every)  # plans the units, once for all ranks
    batches = [planned for rank in range(replicas) for planned in _of_rank(every, rank, sizes)]
    limit = trainer.get("limit_train_batches")
    taken = int(limit * num_of_rank) if isinstance(limit, float) else num_of_rank if limit is None else min(limit, num_of_rank)
    steps = -(-taken // accumulated)
    by_size = sorted(batches, key=lambda batch: (-batch.places, -batch.encoded))
    return Epoch(
        rows=len(loader.rows),
        unusable=int((sizes.tokens_R == 0).sum()),
        tokens=sum(batch.tokens for batch in batches),
        places=sum(batch.places for batch in batches),
        longest=int(sizes.tokens_R.max()),
        batches=taken,
        steps=steps,
        total_steps=_total_steps(trainer, steps),
        largest=tuple(by_size[:num_largest]),
        most_encoded=max(batches, key=lambda batch: (batch.encoded, batch.places)),
    )


def _of_rank(every: GlobalBatches, rank: int, sizes: RowSizes) -> Iterator[PlannedBatch]:
    """The batches that a process gets; one that is empty is left out."""
    own = copy.copy(every)
    own.rank = rank
    for keys in own:
        rows = np.array([key.row for key in keys], np.int64)
        tokens_R, (num_rows_R, longest_R) = sizes.tokens_R[rows], sizes.take(rows).padded()
        if own.batching.kind == "packed" and len(rows):
            longest_R = np.bincount(np.array([key.slot for key in keys]), tokens_R).astype(np.int64)
            num_rows_R = np.ones_like(longest_R)
        if tokens_R.any():
            places = int(num_rows_R[longest_R > 0].sum() * longest_R.max())
            yield PlannedBatch(tuple(keys), places, int(tokens_R.sum()), int(sizes.encoded_R[rows].sum()))


def _total_steps(trainer: Namespace, steps: int) -> int | None:
    max_epochs, max_steps = trainer.get("max_epochs"), trainer.get("max_steps")
    limits = [max_epochs * steps] if max_epochs is not None and max_epochs >= 0 else []
    return min(limits + ([max_steps] if max_steps is not None and max_steps >= 0 else []), default=None)
