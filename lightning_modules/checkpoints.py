"""When checkpoints are written, and where; and that each of them stands between two optimizer steps."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from datamodules.fingerprint import differences
from datamodules.loading import RowDataModule
from datamodules.processor import Processor
from lightning_modules.run_folder import cannot_write, run_folder
from models.checkpoint import read_checkpoint


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that writes to `checkpoints/` in the run folder.

    It keeps the newest checkpoint as `last.ckpt`, and the best one where `monitor` names a metric.

    Args:
        save_last: Keep the newest checkpoint as last.ckpt.
        save_on_exception: Write last.ckpt also when the run is stopped by an error or by the user. Not with several processes:
            the others may be elsewhere, and would be waited for in vain.
    """

    def __init__(self, *args: Any, save_last: bool = True, save_on_exception: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, save_last=save_last, save_on_exception=save_on_exception, **kwargs)  # type: ignore[misc]
        self._weights_move = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the folder."""
        if self.dirpath is None:
            self.dirpath = str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins between two steps."""
        self._weights_move = False
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """From here on some weights may be new and others old."""
        self._weights_move = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Weights and counters agree again: saves if it is time."""
        self._weights_move = False
        waited, self._defer_save_until_validation = self._defer_save_until_validation, False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        waits, self._defer_save_until_validation = self._defer_save_until_validation, waited or self._defer_save_until_validation
        monitored = self._monitor_candidates(trainer)
        if waits and self.monitor not in monitored and not self._should_skip_saving_checkpoint(trainer):
            # Lightning waits for the first validation, to know the best; the newest needs no metric, and a kill does not wait
            step = self._last_global_step_saved
            self._save_last_checkpoint(trainer, monitored)
            self._last_global_step_saved = step  # or the validation that comes would find the step saved already

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a look whether it runs must not write over a run's checkpoint
            return
        # a run that was resumed from before its last checkpoint would call the next one last-v1
        self.last_model_path = self.last_model_path or self._last()
        super()._save_last_checkpoint(trainer, monitor_candidates)

    def _last(self) -> str:
        assert self.dirpath is not None
        return str(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what was trained since the last checkpoint, unless it was stopped in the middle of an update."""
        if trainer.state.fn != TrainerFn.FITTING or not self._should_save_on_exception(trainer):
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress.total
        in_update = self._weights_move and progress.processed < progress.ready  # type: ignore[attr-defined]  # declared too narrowly
        if trainer.world_size > 1 or in_update:
            rank_zero_info(f"stopped without a checkpoint; the last one is {self.last_model_path or 'none'}")
            return
        self.last_model_path = self.last_model_path or self._last()  # before saving, because it is part of what is saved
        try:
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)
        except ValueError as error:  # a full disk must not hide what stopped the run
            rank_zero_warn(str(error))
            return
        rank_zero_info(f"stopped after step {trainer.global_step:,}; --ckpt_path last goes on from {self.last_model_path}")


class CheckpointFile(TorchCheckpointIO):
    """Reads and writes checkpoints as Lightning does, but says in a paragraph what is wrong with one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint under a temporary name in the same folder, then renames it.

        Lightning's own has the temporary file in the system's folder for those. Where that is another disk, to rename is to copy,
        and a full disk or a kill in the middle leaves half a file in the place of the last checkpoint.

        Raises:
            ValueError: It cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(".checkpoint.tmp")  # one name: what a killed run left is overwritten by the next
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # torch's writer hides what the disk said
            if not isinstance(reason, OSError):
                raise
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise ValueError(cannot_write(path, reason)) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint to the CPU, without running code from it.

        Raises:
            ValueError: There is no such file, it is damaged, or no checkpoint of ours.
        """
        return read_checkpoint(path)


@dataclass(frozen=True)
class StepStart:
    """Where a run stood when the first batch of an optimizer step began.

    A checkpoint that is written before the step is over holds the weights from before it. So it also must hold this place in
    the data and these random generators: the resumed run takes the step from its beginning.
    """

    global_step: int
    rng: dict[str, Tensor]
    fit_loop: dict[str, Any]
    datamodule: dict[str, Any] | None

    @classmethod
    def now(cls, trainer: Trainer) -> "StepStart":
        """To be called when a batch begins."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        place = None if datamodule is None else datamodule.state_dict()
        return cls(trainer.global_step, rng_state(), trainer.fit_loop.state_dict(), place)

    def is_open(self, trainer: Trainer) -> bool:
        """Whether the weights are still those of the beginning."""
        return trainer.global_step == self.global_step

    def rewind(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Sets a checkpoint back to the beginning of the step, if that is not over."""
        if not self.is_open(trainer):
            return
        checkpoint["rng"] = self.rng
        checkpoint["loops"]["fit_loop"] = self.fit_loop
        if self.datamodule is not None:
            name = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]  # Lightning's key
            checkpoint[name] = self.datamodule


def check_processor(now: Processor, files: Mapping[str, bytes], resumes: bool) -> None:
    """Compares the processor of a run with that of the checkpoint that it goes on from.

    Args:
        now: The run's.
        files: The checkpoint's.
        resumes: Training goes on; otherwise the checkpoint is only looked at, which another prompt may be meant for.

    Raises:
        ValueError: Training would go on with other examples than it began with.
    """
    if now.files() == files or not (changed := differences(now, Processor.from_files(files))):
        return
    if resumes:
        raise ValueError(
            f"the checkpoint was trained on other examples than this run would make: {'; '.join(changed)}. Set that back, or "
            "start another run from its weights with model.init_from"
        )
    rank_zero_warn(f"the checkpoint was trained on other examples than it is now shown: {'; '.join(changed)}")


def rng_state() -> dict[str, Tensor]:
    """The state of torch's random generators on this process and its device."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Sets torch's random generators to a state that `rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def add_place(checkpoint: dict[str, Any], trainer: Trainer, step_start: StepStart | None) -> None:
    """Adds `rng`, the random generators of all processes by rank, which must meet here; and adds up what their data modules say.

    Args:
        checkpoint: Of this process; the first one writes it for all of them.
        trainer: Of the run.
        step_start: Where the step at hand began, which the checkpoint is set back to; None: there is none.
    """
    checkpoint["rng"] = rng_state()
    if step_start is not None:
        step_start.rewind(checkpoint, trainer)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
    name = type(datamodule).__qualname__ if isinstance(datamodule, RowDataModule) else ""
    states: list[Any] = [(checkpoint["rng"], checkpoint.get(name))] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(states, states[0])
    checkpoint["rng"] = [rng for rng, _ in states]
    if name in checkpoint:
        checkpoint[name] = datamodule.together([place for _, place in states])
        # Lightning keeps the loader's state too, of the first process alone, and would load it over that of the data module
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)


def own_rng_state(states: Sequence[Mapping[str, Tensor]], trainer: Trainer) -> Mapping[str, Tensor] | None:
    """The state of this process out of those of all that wrote a checkpoint; None: there were not as many as now."""
    if len(states) == trainer.world_size:
        return states[trainer.global_rank]
    rank_zero_warn(
        f"the checkpoint is of {len(states)} process(es) and goes on in {trainer.world_size}: the rows come in the same batches, "
        "but dropout draws other numbers than it would have"
    )
    return None
