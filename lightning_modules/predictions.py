"""The answers of `predict`, as JSONL in the run folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_modules.answers import is_right
from lightning_modules.run_folder import run_folder


class PredictionWriter(Callback):
    """Writes one JSON line a row to `predictions.jsonl`: what `predict_step` returns, and whether it is `right`.

    A row without a reference answer is neither right nor wrong: null. Nor is one that was not answered, but scored.

    Until all rows are there, each process writes to `.predictions.<rank>.part`, which an interrupted prediction leaves behind.
    An earlier `predictions.jsonl` stays: the next ones are called `predictions-2.jsonl`, `predictions-3.jsonl`, …
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._num_rows = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file of this process.

        Raises:
            ValueError: The run folder cannot be written.
        """
        path = _part(run_folder(trainer), trainer.global_rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}): give another folder with --trainer.default_root_dir"
            ) from error
        self._num_rows = 0

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Adds the rows of a batch; they are on the disk when the next batch starts."""
        assert self._file is not None
        self._file.writelines(json.dumps(_judged(row), ensure_ascii=False) + "\n" for row in outputs)
        self._file.flush()
        self._num_rows += len(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the complete file its name."""
        self._close()
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        parts = [_part(folder, rank) for rank in range(trainer.world_size)]
        if len(parts) > 1:
            self._num_rows = _merge(parts)
        path = _free_name(folder / "predictions.jsonl")
        parts[0].replace(path)
        rank_zero_info(f"{self._num_rows:,} predictions in {path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says where the rows so far are."""
        if self._file is not None:
            path = self._file.name
            self._close()
            rank_zero_info(f"prediction stopped; its first {self._num_rows:,} rows are in {path}")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    if "response" not in row:
        return row
    return {**row, "right": is_right(row["response"], row["reference"]) if row["reference"] else None}


def _part(folder: Path, rank: int) -> Path:
    return folder / f".predictions.{rank}.part"


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def _merge(parts: Sequence[Path]) -> int:
    """Merges the files of all ranks into the first, in the order of sources, files and lines; returns the number of rows.

    Ranks must do equally many batches, so the last rows may have been given to two of them: each row is kept once.
    """
    rows: dict[tuple[str, str, int], str] = {}
    for part in parts:
        for line in part.read_text(encoding="utf-8").split("\n")[:-1]:  # not splitlines: it also breaks at U+2028
            row = json.loads(line)
            rows.setdefault((row.get("source", ""), row["file"], row["line"]), line)
    files = list(dict.fromkeys(key[:2] for key in rows))
    ordered = sorted(rows, key=lambda key: (files.index(key[:2]), key[2]))
    merged = parts[0].with_suffix(".merged")
    merged.write_text("".join(f"{rows[key]}\n" for key in ordered), encoding="utf-8")
    merged.replace(parts[0])
    for part in parts[1:]:
        part.unlink()
    return len(rows)
