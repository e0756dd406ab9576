"""When checkpoints are written, and where: in the run folder, whatever the logger."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that writes to `checkpoints/` in the run folder.

    It keeps the newest checkpoint as `last.ckpt`, the best one where `monitor` names a metric, and saves also when a run
    is stopped by an error or by the user.

    Args:
        save_last: Keep the newest checkpoint as last.ckpt.
        save_on_exception: Save when the run is stopped by an error or by the user.
    """

    def __init__(self, *args: Any, save_last: bool = True, save_on_exception: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, save_last=save_last, save_on_exception=save_on_exception, **kwargs)  # type: ignore[misc]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the folder."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
