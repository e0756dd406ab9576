"""What a fit did, in one line and one file."""

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from datamodules.batch import MODALITIES, Batch, Modality
from lightning_modules.checkpoints import write_account
from lightning_modules.run_folder import run_folder

if TYPE_CHECKING:
    from datamodules.loading import RowDataModule
    from lightning_modules.multimodal import MultiModalLitModule

SUMMARY = "summary.json"
"""What a fit did, in its run folder."""


@dataclass(frozen=True)
class Counts:
    """Rows and media of a fit.

    Args:
        rows: Rows of the last epoch: rows = trained + skipped + not_reached; and its dropped_tokens.
        media: Media in the rows of the last epoch, by modality.
        seen: Media in the rows of the whole fit, by modality; of a resumed one, as far as is known.
        sources: The rows by the name of their source, of a mixture.
    """

    rows: dict[str, int]
    media: dict[Modality, int]
    seen: dict[Modality, int]
    sources: dict[str, dict[str, int]]

    def add_up(self, trainer: Trainer) -> Self:
        """The sum over all processes, which must meet here."""
        columns: list[dict[Any, int]] = [self.rows, self.media, self.seen, *self.sources.values()]
        own = torch.tensor([count for column in columns for count in column.values()], device=trainer.strategy.root_device)
        times = num_with_same_rows(trainer)
        total = (count // times for count in trainer.strategy.reduce(own, reduce_op="sum").tolist())
        rows, media, seen, *of_sources = ({name: next(total) for name in column} for column in columns)
        return type(self)(rows, media, seen, dict(zip(self.sources, of_sources, strict=True)))

    def untrained(self) -> Self:
        """The same rows, of which none has been reached."""
        accounts = (self.rows, *self.sources.values())
        rows, *sources = (dict.fromkeys(each, 0) | dict.fromkeys(("rows", "not_reached"), each["rows"]) for each in accounts)
        media, seen = (dict.fromkeys(column, 0) for column in (self.media, self.seen))
        return type(self)(rows, media, seen, dict(zip(self.sources, sources, strict=True)))

    def line(self, modalities: Collection[Modality]) -> str:
        """The last epoch in a line, with the media of these modalities and of any other that was met."""
        named = [f"{count:,} {name}" for name, count in self.media.items() if count or name in modalities]
        return _account("rows", self.rows) + (f"; media in them: {', '.join(named)}" if named else "")

    def source_lines(self) -> list[str]:
        """A line for each source."""
        return [_account(f"  of {name}", rows) for name, rows in self.sources.items()]


class RunSummary(Callback):
    """Sums a fit up when it ends, also when it is stopped or fails: a line in the log, and `summary.json` in the run folder.

    Rows and media are those of the last epoch. An encoder that no row of the whole fit had media for earns a warning; not so in a
    fit that was resumed after its first epoch, since checkpoints know the media of one epoch. A run that was killed between its
    last checkpoint and its end is summed up when it is resumed, without time, memory and metrics, which went with its process. A
    fit of another folder that finds nothing left to do has trained no row.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._seen: Counter[Modality] = Counter()
        self._saw_all = False
        self._counts: Counts | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started, self._counts = time.monotonic(), None
        self._seen = Counter(_datamodule(trainer).media_counts())  # those that a resumed epoch had before
        self._saw_all = trainer.current_epoch == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Counts the media of the fit."""
        self._seen.update({modality: len(batch[modality]["item_O"]) for modality in MODALITIES if modality in batch})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the counts of all processes up, while they can still reach each other."""
        self._counts = self._own_counts(trainer).add_up(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sums a complete fit up, also one that had nothing left to do."""
        if self._started is None and trainer.global_step:
            rank_zero_info(_nothing_left(trainer))
            if not _is_summed_up(trainer):
                self._saw_all = False
                counts = self._own_counts(trainer)
                self._counts = (counts if _is_of_this_run(trainer) else counts.untrained()).add_up(trainer)
        self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Sums up what there is, if training had begun."""
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        status = "interrupted" if stopped else f"failed: {type(exception).__name__}: {exception}"
        try:
            self._write(trainer, pl_module, status)
        except ValueError as error:  # a full disk must not hide what stopped the run
            rank_zero_warn(str(error))

    def _own_counts(self, trainer: Trainer) -> Counts:
        datamodule = _datamodule(trainer)
        seen = {name: self._seen[name] for name in MODALITIES}
        sources = {name: rows for name, rows in datamodule.source_counts().items() if name}
        return Counts(datamodule.row_counts(), datamodule.media_counts(), seen, sources)

    def _write(self, trainer: Trainer, pl_module: LightningModule, status: str) -> None:
        started, added_up = self._started, self._counts
        self._started = self._counts = None
        if (started is None and added_up is None) or not trainer.is_global_zero:
            return
        of_all = added_up is not None or trainer.world_size == 1
        counts = added_up or self._own_counts(trainer)
        parts = cast("MultiModalLitModule", pl_module).parts()
        encoded = [modality for modality in MODALITIES if f"{modality}_encoder" in parts]
        training = {name.partition("_")[0] for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}
        rank_zero_info(counts.line(encoded) + ("" if of_all else " (this process alone)"))
        for line in counts.source_lines():
            rank_zero_info(line)
        if of_all and self._saw_all and counts.rows["trained"]:
            for modality in encoded:
                if modality in training and not counts.seen[modality]:
                    rank_zero_warn(_never_seen(modality))
        summary: dict[str, Any] = {
            "status": status,
            **counts.rows,
            "media": counts.media,
            **({"sources": counts.sources} if counts.sources else {}),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
        }
        if started is not None:
            summary |= {"seconds": round(time.monotonic() - started, 1), **_peak_memory(trainer.strategy.root_device)}
        if isinstance(checkpoint := trainer.checkpoint_callback, ModelCheckpoint):
            for name, path in (("best", checkpoint.best_model_path), ("last", checkpoint.last_model_path)):
                summary[f"{name}_checkpoint"] = path if path and Path(path).exists() else None  # one may never have been whole
        summary["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        write_account(trainer, SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def num_with_same_rows(trainer: Trainer) -> int:
    """How many processes in turn share one model's layers, and so get the same rows."""
    replicas = trainer.distributed_sampler_kwargs
    return 1 if replicas is None else trainer.world_size // replicas["num_replicas"]


def _datamodule(trainer: Trainer) -> "RowDataModule":
    return trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared


def _is_summed_up(trainer: Trainer) -> bool:
    """Whether the run folder has the summary of this very end; all processes get the answer of the first."""
    summary: dict[str, Any] = {}
    path = run_folder(trainer) / SUMMARY
    if trainer.is_global_zero and path.is_file():
        summary = json.loads(path.read_text(encoding="utf-8"))
    return trainer.strategy.broadcast(summary == summary | {"status": "finished", "steps": trainer.global_step})


def _is_of_this_run(trainer: Trainer) -> bool:
    """Whether the checkpoint that a fit went on from lies in its run folder."""
    path = trainer.ckpt_path
    return path is not None and Path(path).resolve().is_relative_to(run_folder(trainer).resolve())


def _nothing_left(trainer: Trainer) -> str:
    return (
        f"no step was left to make, and none was made: the checkpoint is of step {trainer.global_step:,}, epoch "
        f"{trainer.current_epoch:,}, and the run ends there (trainer.max_epochs {trainer.max_epochs}, trainer.max_steps "
        f"{trainer.max_steps}). To train on, raise them"
    )


def _account(name: str, rows: dict[str, int]) -> str:
    line = f"{name}: {rows['rows']:,} = {rows['trained']:,} trained + {rows['skipped']:,} skipped"
    return line + (f" + {rows['not_reached']:,} not reached in the last epoch" if rows["not_reached"] else "")


def _never_seen(modality: Modality) -> str:
    return (
        f"the model has {modality}_encoder and {modality}_projector, but none of the rows that this fit trained on has "
        f"{modality} media, so they have learnt nothing. Check the rows of data.train_path (<{modality}> in the text, "
        f"{modality}s beside it), or leave the two out"
    )


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Largest resident size of this process so far, and what it had of a CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB elsewhere
    peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    return peak | ({"peak_cuda_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})
