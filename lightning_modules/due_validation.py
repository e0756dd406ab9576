"""Validations that are due when a run stops, or not over, and that the run which goes on with it makes up first.

Lightning would go on behind them without a word: a point of the curve would be missing, and a checkpoint that is the best of the
run would never be written.
"""

from typing import Any

from lightning.pytorch import Trainer


def is_due(trainer: Trainer) -> bool:
    """Whether a validation follows before the next batch: one that has begun, or that begins behind `on_train_batch_end`."""
    loop: Any = trainer.fit_loop.epoch_loop
    if trainer.validating:
        progress = loop.val_loop.batch_progress
        return not progress.is_last_batch or progress.current.completed < progress.current.ready
    batches = loop.batch_progress.current
    is_batch_end = batches.completed < batches.processed
    return is_batch_end and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # what Lightning itself will ask


def hold(checkpoint: dict[str, Any]) -> None:
    """Lets a checkpoint say that its batch is over, and a validation begun of which no batch is done.

    Then Lightning validates from the first batch on, at the end of an epoch as in its middle, before it does anything else.
    """
    loops = checkpoint["loops"]["fit_loop"]
    for counts in (batches := loops["epoch_loop.batch_progress"])["current"], batches["total"]:
        counts["completed"] = counts["processed"]
    validated = loops["epoch_loop.val_loop.batch_progress"]
    done = validated["total"]["completed"]
    validated["total"].update(ready=done + 1, started=done + 1, processed=done)
    validated["current"].update(dict.fromkeys(validated["current"], 0))
