"""The evaluation side of every LightningModule of the project: metrics added batch by batch, and logged when it is over."""

from collections.abc import Mapping
from typing import Literal

import lightning as L
from torch import Tensor

from datamodules.batch import Batch
from lightning_modules.epoch_means import EpochMeans, RowValues

Stage = Literal["train", "val", "test"]


class MeasuringLitModule(L.LightningModule):
    """Logs the means of what `measure` was told in a validation or a test: `val/<metric>`, `val/<source>/<metric>`."""

    def __init__(self) -> None:
        super().__init__()
        self._means = EpochMeans()
        self.is_lent = False  # the batch at hand is that of another process, and must not count

    def measure(self, batch: Batch, values: Mapping[str, RowValues]) -> None:
        """Adds metrics of a batch; a subclass may add any of its own.

        Args:
            batch: The batch that they are of.
            values: For each metric the totals and the counts of the rows; its mean is all totals divided by all counts.
        """
        if self.is_lent:
            return
        self._means.add(values, [example.get("source", "") for example in batch["examples"]])

    def on_validation_epoch_start(self) -> None:
        """Begins to count."""
        self._means.reset()

    def on_validation_epoch_end(self) -> None:
        """Logs what was measured."""
        self._log_means("val")

    def on_test_epoch_start(self) -> None:
        """Begins to count."""
        self._means.reset()

    def on_test_epoch_end(self) -> None:
        """Logs what was measured."""
        self._log_means("test")

    def log_step(self, loss: Tensor | None) -> None:
        """Logs the mean loss of an optimizer step; None: there is none."""
        if loss is not None:
            self.log("train/loss", loss, prog_bar=True)

    def complete(self, means: dict[str, float]) -> dict[str, float]:
        """The means of an evaluation or of a step, and what follows from them; a subclass may add to them."""
        return means

    def _log_means(self, stage: Stage) -> None:
        for metric, mean in self.complete(self._means.compute(self.trainer)).items():
            self.log(f"{stage}/{metric}", mean, prog_bar=(stage, metric) == ("val", "loss"), sync_dist=True)
