"""Epochs that a fit ends in the middle, and that a run goes on with when it is made longer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer


@contextmanager
def kept_open(trainer: Trainer) -> Iterator[bool]:
    """To be entered when an epoch ends: within it a checkpoint does not count one that is left in its middle, as by `max_steps`.

    Lightning has counted it as processed by then. A run that goes on with the epoch would count it again, and end an epoch early.

    Yields:
        Whether the epoch is left in its middle.
    """
    is_open = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    progress: Any = trainer.fit_loop.epoch_progress  # declared too narrowly
    for counts in (progress.current, progress.total):
        counts.processed -= int(is_open)
    try:
        yield is_open
    finally:
        for counts in (progress.current, progress.total):
            counts.processed += int(is_open)
