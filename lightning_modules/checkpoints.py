"""When checkpoints are written, and where; and that each of them stands between two optimizer steps."""

import io
import os
import signal
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.open_epoch import kept_open
from lightning_modules.run_folder import cannot_write, checkpoint_folder, run_folder, write_text
from lightning_modules.signals import Signals, StoppedBySignal, requeue
from models.checkpoint import read_checkpoint
from models.manifest import HashingWriter, Manifest, copy, discard, manifest_path, publish, read_manifest, sweep, temporary_name


class CannotSaveError(ValueError):
    """The disk is full, or fails; the checkpoint that stood there before stands there still."""


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that writes to `checkpoints/` in the run folder.

    It keeps the newest checkpoint as `last.ckpt`, and the best one where `monitor` names a metric.

    SIGTERM and SIGINT (Ctrl-C) end the fit after the optimizer step, or the batch of a validation, at hand, on all processes
    together, with a checkpoint and the exit code 143 or 130; a second SIGINT ends it at once. SIGUSR1 writes a checkpoint, and
    the run goes on. In a SLURM job, whose scheduler sends it before the time is up (`#SBATCH --signal=USR1@90`), it puts the job
    back into the queue, to go on from there by itself.

    Args:
        save_last: Keep the newest checkpoint as last.ckpt.
        save_on_exception: Write last.ckpt also when the run is stopped by an error or by the user. Not with several processes:
            the others may be elsewhere, and would be waited for in vain.
        on_save_error: What to do where a checkpoint, or a file that tells of the run, cannot be written, as on a full disk:
            `stop`, or `go_on` and say so. What was written before stays in any case.
    """

    def __init__(
        self,
        *args: Any,
        save_last: bool = True,
        save_on_exception: bool = True,
        on_save_error: Literal["stop", "go_on"] = "stop",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, save_last=save_last, save_on_exception=save_on_exception, **kwargs)  # type: ignore[misc]
        self.on_save_error = on_save_error
        self._weights_move = False
        self._signals = Signals()
        self._written: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the folder, which must be the run's own, and clears away what one that was killed while it saved left there."""
        self.dirpath = str(checkpoint_folder(run_folder(trainer), self.dirpath))
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning
            for folder in (Path(self.dirpath), run_folder(trainer), run_folder(trainer) / "non_finite"):
                sweep(folder)
        super().setup(trainer, pl_module, stage)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes signals, before processes are started that would get them too."""
        self._signals.listen()

    def state_dict(self) -> dict[str, Any]:
        """Also what was written and not removed: a kill may come between a new checkpoint and the removal of an old one."""
        return {**super().state_dict(), "written": sorted(self._written)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._written = set(state_dict.get("written", ()) if self.dirpath == state_dict.get("dirpath") else ())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends what a kill has stopped behind the checkpoint that the run goes on from: last.ckpt, and removing old ones."""
        if not trainer.is_global_zero or not trainer.ckpt_path:
            return
        taken, last = Path(trainer.ckpt_path), Path(self._last())
        if str(taken) in self._written:
            for path in self._written - {str(taken), str(last), self.best_model_path, *self.best_k_models}:
                self._remove_checkpoint(trainer, path)
        if taken == last or not taken.is_relative_to(run_folder(trainer)):
            return
        newer, there = read_manifest(taken), read_manifest(last)
        if newer and there and newer.written_ns > there.written_ns:
            try:
                copy(taken, last)  # or a run that was killed behind its last step would end with an older one
            except OSError as error:
                rank_zero_warn(cannot_write(last, error))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins between two steps."""
        self._weights_move = False
        self._signals.listen()
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """From here on some weights may be new and others old."""
        self._weights_move = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Weights and counters agree again: saves if it is time, and if a signal asked for it."""
        is_step_over, self._weights_move = self._weights_move, False
        waited, self._defer_save_until_validation = self._defer_save_until_validation, False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        waits, self._defer_save_until_validation = self._defer_save_until_validation, waited or self._defer_save_until_validation
        monitored = self._monitor_candidates(trainer)
        if waits and self.monitor not in monitored and not self._should_skip_saving_checkpoint(trainer):
            # Lightning waits for the first validation, to know the best; the newest needs no metric, and a kill does not wait
            step = self._last_global_step_saved
            self._save_last_checkpoint(trainer, monitored)
            self._last_global_step_saved = step  # or the validation that comes would find the step saved already
        if is_step_over:
            self._obey_signals(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Saves and stops if a signal asked for it."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._obey_signals(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves also where the epoch is left in its middle, as by `max_steps`: after this Lightning calls all of it done."""
        with kept_open(trainer) as is_open:
            super().on_train_epoch_end(trainer, pl_module)
            if is_open and not self._should_skip_saving_checkpoint(trainer):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was trained since the last checkpoint, and leaves signals to those who had them before."""
        self._signals.restore()
        if not self._should_skip_saving_checkpoint(trainer):  # Lightning does so only where there is none at all
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _obey_signals(self, trainer: Trainer) -> None:
        signum = self._signals.agreed(trainer)
        if not signum:
            return
        name = signal.Signals(signum).name
        requeues = self._signals.requeues
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if signum == signal.SIGUSR1 and not requeues:
            rank_zero_info(f"{name}: step {trainer.global_step:,} is saved, the run goes on")
            return
        if signum == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        rank_zero_info(f"{name}: stopped after step {trainer.global_step:,}; --ckpt_path last goes on from there")
        raise StoppedBySignal(signum)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a look whether it runs must not write over a run's checkpoint
            return
        # a run that was resumed from before its last checkpoint would call the next one last-v1
        self.last_model_path = self.last_model_path or self._last()
        self._attempt(super()._save_last_checkpoint, trainer, monitor_candidates)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._attempt(super()._save_topk_checkpoint, trainer, monitor_candidates)

    def _attempt(self, save: Callable[..., None], trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Saves, or says why not and forgets about it, so that Lightning removes no earlier checkpoint for a later one."""
        before = deepcopy(self.state_dict())
        try:
            save(trainer, monitor_candidates)
        except CannotSaveError as error:
            if self.on_save_error == "stop":
                raise
            self.load_state_dict(before)
            without = f"a checkpoint of step {trainer.global_step:,}"  # with it, since Python shows a warning of one text once
            rank_zero_warn(f"{error}. The run goes on without {without}, since checkpoint.on_save_error is go_on")

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        # Lightning spares the one that a run goes on from, which one that was not stopped would have removed
        return previous != current and previous in self._written

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        self._written.discard(filepath)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._written.add(filepath)  # before saving, because it is part of what is saved
        save_together(trainer, filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))

    def _last(self) -> str:
        assert self.dirpath is not None
        return str(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what was trained since the last checkpoint, unless it was stopped in the middle of an update, or at once."""
        self._signals.restore()
        if trainer.state.fn != TrainerFn.FITTING or not self._should_save_on_exception(trainer):
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress.total
        in_update = self._weights_move and progress.processed < progress.ready  # type: ignore[attr-defined]  # declared too narrowly
        if trainer.world_size > 1 or in_update or isinstance(exception, StoppedBySignal):
            rank_zero_info(f"stopped without a checkpoint; the last one is {self.last_model_path or 'none'}")
            return
        self.last_model_path = self.last_model_path or self._last()  # before saving, because it is part of what is saved
        try:
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)
        except ValueError as error:  # a full disk must not hide what stopped the run
            rank_zero_warn(str(error))
            return
        rank_zero_info(f"stopped after step {trainer.global_step:,}; --ckpt_path last goes on from {self.last_model_path}")


def write_account(trainer: Trainer, name: str, text: str) -> None:
    """Writes a file that tells of a run into its folder, or goes on without it, if `on_save_error` says so for checkpoints.

    Raises:
        ValueError: It cannot be written.
    """
    checkpoint = trainer.checkpoint_callback
    try:
        write_text(run_folder(trainer) / name, text)
    except ValueError as error:
        if not isinstance(checkpoint, RunCheckpoint) or checkpoint.on_save_error == "stop":
            raise
        rank_zero_warn(f"{error}. The run goes on without it, since checkpoint.on_save_error is go_on")


def save_together(trainer: Trainer, path: str | Path, weights_only: bool = False) -> None:
    """Saves a checkpoint; where it cannot be written, no process waits for another.

    Raises:
        CannotSaveError: It cannot be written, on all processes.
    """
    problem = ""
    try:
        trainer.save_checkpoint(path, weights_only)
    except CannotSaveError as error:  # on the process that writes, on its way to where the others wait for it
        problem = str(error)
        trainer.strategy.barrier()
    if problem := trainer.strategy.broadcast(problem):
        raise CannotSaveError(problem)


class CheckpointFile(TorchCheckpointIO):
    """Reads and writes checkpoints as Lightning does, each with a manifest, and says in a paragraph what is wrong with one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint under a temporary name in the same folder, then its manifest, then renames both.

        Lightning's own has the temporary file in the system's folder for those. Where that is another disk, to rename is to copy,
        and a full disk or a kill in the middle leaves half a file in the place of the last checkpoint.

        Raises:
            CannotSaveError: It cannot be written.
        """
        path = Path(path)
        temporary = temporary_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with HashingWriter(self.open(temporary)) as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            manifest = Manifest(checkpoint.get("global_step", 0), {path.name: file.sum()}, checkpoint.get("wandb_run_id"))
            publish(temporary, path, manifest)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # torch's writer hides what the disk said
            if not isinstance(reason, OSError):
                raise
            discard(temporary)
            raise CannotSaveError(cannot_write(path, reason)) from error

    def open(self, path: Path) -> io.RawIOBase:
        """The file that a checkpoint is written to, unbuffered."""
        return path.open("wb", buffering=0)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint to the CPU, without running code from it.

        Raises:
            ValueError: There is no such file, it is damaged, or no checkpoint of ours.
        """
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint, then its manifest."""
        super().remove_checkpoint(path)
        manifest_path(Path(path)).unlink(missing_ok=True)
