"""All rows of all splits, read once by worker processes."""

from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader

from datamodules.loading import RowDataModule
from datamodules.source import SPLITS
from inspection.reader import RowReader
from inspection.records import Part, RowRecord
from inspection.scorers import PairScorer

ROWS_A_TASK = 16
"""Rows that a worker takes at a time: neighbours often share their media."""


class Tasks:
    """The rows of all parts in order, a few at a time.

    Args:
        sizes: The rows of each part.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return sum(-(-size // ROWS_A_TASK) for size in self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part, size in enumerate(self.sizes):
            for start in range(0, size, ROWS_A_TASK):
                yield [(part, row) for row in range(start, min(start + ROWS_A_TASK, size))]


def find_parts(datamodule: RowDataModule) -> list[Part]:
    """The files of all splits that have one, in the order of the splits; a validation split may be part of a training file.

    Raises:
        ValueError: None has, or one cannot be used.
    """
    rows = dict(zip(("train", "val"), datamodule.held_out_rows(), strict=True))
    splits = [split for split in SPLITS if any(source.path(split) is not None for source in datamodule.sources.values())]
    if not splits:
        raise ValueError("no split has a file: set data.train_path, val_path, test_path or predict_path")
    return [Part(split, source) for split in splits for source in datamodule.dataset(split, rows.get(split)).sources]


def survey(parts: Sequence[Part], num_workers: int, scorer: PairScorer | None = None) -> Iterator[list[RowRecord]]:
    """Reads all rows. The records are the same, in the same order, however many workers there are.

    Args:
        parts: Where they stand.
        num_workers: Processes that read and decode; 0: this one does it.
        scorer: Scores media against their text; None: nobody does.

    Yields:
        The records of a few rows, in order.
    """
    yield from DataLoader(
        RowReader(parts, scorer),
        batch_sampler=Tasks([len(part.dataset) for part in parts]),
        collate_fn=list,
        num_workers=num_workers,
    )
