"""A model that writes down what it gets, and a trainer that says nothing."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from datamodules.batch import Batch
from tests.datamodules.loader_fakes import ids


class Model(L.LightningModule):
    """Writes down what it gets; fails at one of its batches."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.fail_at = fail_at
        self.trained: list[Batch] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if len(self.trained) == self.fail_at:
            raise RuntimeError("stopped")
        self.trained.append(batch)
        return self.linear(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += ids([batch])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        return ids([batch])[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0  # as a schedule does: it asks for the loader before a resume
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, callbacks=list(callbacks), **({"max_epochs": 2} | quiet | options)
    )
