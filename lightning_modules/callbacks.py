"""The callbacks of a run: what it measures, shows and sums up.

All of them can be named from here: `PartTable`, `FirstStepCheck`, `Throughput`, `ProgressBar`, `RunSummary`,
`PredictionWriter`, `SamplePage`.
"""

import logging
import sys
import time
from collections import deque
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from datamodules.batch import Batch
from lightning_modules.first_step import FirstStepCheck
from lightning_modules.part_table import PartTable
from lightning_modules.predictions import PredictionWriter
from lightning_modules.run_summary import RunSummary
from lightning_modules.samples import SamplePage

__all__ = ["FirstStepCheck", "PartTable", "PredictionWriter", "ProgressBar", "RunSummary", "SamplePage", "Throughput"]


class _Measured(NamedTuple):
    """What one training batch took: tokens without padding, those with a loss, seconds in all and seconds waited for data."""

    tokens: int
    supervised: int
    seconds: float
    waited: float


class Throughput(Callback):
    """Logs how fast this process trains, over the batches of one logging interval.

    - `train/tokens_per_s`: tokens that are not padding, a second.
    - `train/data_wait`: share of the time in which the process waited for its next batch.
    - `train/supervised_tokens`: tokens with a loss in an optimisation step.

    Validation and the writing of checkpoints do not count.
    """

    def __init__(self) -> None:
        self._window: deque[_Measured] = deque()
        self._started = 0.0
        self._ended: float | None = None
        self._waited = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        batches = max(1, trainer.log_every_n_steps) * trainer.accumulate_grad_batches  # type: ignore[attr-defined]  # set by Lightning
        self._window = deque(maxlen=batches)
        self._ended = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """The batch is there: the waiting is over."""
        self._started = time.perf_counter()
        self._waited = self._started - self._ended if self._ended is not None else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Logs the figures of the interval that ends here."""
        # plain numbers, so that no batch waits for the device; the reading of a step's loss does, once for all its batches
        tokens, supervised = batch["num_tokens"], batch["num_supervised"]
        self._ended = time.perf_counter()
        self._window.append(_Measured(tokens, supervised, self._ended - self._started + self._waited, self._waited))
        total = _Measured(*(sum(column) for column in zip(*self._window, strict=True)))
        steps = len(self._window) / trainer.accumulate_grad_batches
        pl_module.log("train/tokens_per_s", total.tokens / total.seconds, prog_bar=True, batch_size=1)
        pl_module.log("train/data_wait", total.waited / total.seconds, prog_bar=True, batch_size=1)
        pl_module.log("train/supervised_tokens", total.supervised / steps, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What lies between the two batches is no waiting."""
        self._ended = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What lies between the two batches is no waiting."""
        self._ended = None


class ProgressBar(RichProgressBar):
    """Lightning's rich progress bar with short figures: loss 0.412, tokens/s 2.1k, wait 3 %. Log lines go above it.

    Args:
        refresh_rate: How often a second it is drawn; 0: not at all.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leads the log to where rich looks for it."""
        super().setup(trainer, pl_module, stage)
        for handler in [*logging.getLogger().handlers, *logging.getLogger("lightning.pytorch").handlers]:
            if type(handler) is logging.StreamHandler and handler.stream is sys.stderr:
                handler.setStream(_CurrentStderr())

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's columns, with a bar that leaves room for the figures, and without batches a second."""
        description, bar, batches, seconds, _ = super().configure_columns(trainer)
        bar.bar_width = 20
        return [description, bar, batches, seconds]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """The figures by short name, as text."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {_short_name(name): _short_value(name, value) for name, value in metrics.items()}


class _CurrentStderr:
    """What `sys.stderr` is at the time of writing: rich puts its own there while a bar is shown."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _short_name(name: str) -> str:
    name = name.removeprefix("train/")
    return {"tokens_per_s": "tokens/s", "data_wait": "wait"}.get(name, name)


def _short_value(name: str, value: Any) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    if name == "train/data_wait":
        return f"{100 * value:.0f} %"
    if name == "train/tokens_per_s":
        return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
    return f"{value:.3f}"
