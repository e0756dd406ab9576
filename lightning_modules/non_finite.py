"""What happens to a step whose loss or gradients are not finite: rows are named, the step is kept, the run stops or goes on."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_modules.checkpoints import save_together
from lightning_modules.loss_scale import scaler_of
from lightning_modules.run_folder import CONFIG, run_folder
from lightning_modules.run_summary import num_with_same_rows

OnNonFinite = Literal["stop", "skip"]
Rows = Sequence[dict[str, Any]]
_MOST_DUMPS = 3
_MOST_IN_A_ROW = 10


class NonFiniteSteps:
    """Reports steps that changed no weight because something was not finite.

    Args:
        policy: Whether the run stops, or leaves such steps out.
    """

    def __init__(self, policy: OnNonFinite) -> None:
        self.policy = policy
        self._num_dumps = self._in_a_row = 0

    def passed(self) -> None:
        """A step was finite."""
        self._in_a_row = 0

    def refuse(self, trainer: Trainer, loss: float, in_gradients: bool, broken: Rows, rows: Rows) -> None:
        """Names the rows, keeps what it takes to do the step again, and stops the run where it is not to go on.

        Args:
            trainer: Of the run; all its processes must meet here.
            loss: The mean loss of the step.
            in_gradients: Whether gradients are not finite.
            broken: Rows of this process in batches whose loss is not finite.
            rows: All of its rows in the step.

        Raises:
            ValueError: The run is not to go on.
        """
        step, self._in_a_row = trainer.global_step, self._in_a_row + 1
        names: list[Any] = [_names(broken), _names(rows)]
        if trainer.world_size > 1:
            of_all: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(of_all, names)
            names = [sum(column, []) for column in zip(*of_all[:: num_with_same_rows(trainer)], strict=True)]
        told_rows = names[0] or names[1]  # a gradient alone may be of any row of the step
        shown = ", ".join(told_rows[:8]) + (f" and {len(told_rows) - 8} more" if len(told_rows) > 8 else "")
        what = "the gradient" if math.isfinite(loss) and in_gradients else "the loss"
        scaler = scaler_of(trainer)
        scale = "" if scaler is None else f"loss scale {scaler.get_scale():,g}; "
        told = f"{what} of step {step:,} is not finite (loss {loss}; {scale}rows {shown or 'none'}). No weight has changed"
        if self._num_dumps < _MOST_DUMPS:
            self._num_dumps += 1
            told += _keep(trainer, run_folder(trainer) / "non_finite" / f"step={step}.ckpt")
        if self.policy == "stop" or self._in_a_row >= _MOST_IN_A_ROW:
            in_a_row = f"{self._in_a_row} steps in a row; " if self.policy == "skip" else ""
            raise ValueError(
                f"{in_a_row}{told}. Lower the learning rate, clip gradients with trainer.gradient_clip_val, avoid 16-mixed and "
                "16-true, look at these rows, or set model.on_non_finite to skip to leave such steps out"
            )
        rank_zero_warn(f"{told}. The step is left out, since model.on_non_finite is skip")


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(f"{row['file']}:{row['line']}" for row in rows))


def _keep(trainer: Trainer, path: Path) -> str:
    """Saves a checkpoint that stands before the step at hand, and says how to do the step again."""
    try:
        save_together(trainer, path)
    except ValueError as error:
        return f", but a checkpoint to do it again from cannot be kept: {error}"
    folder = run_folder(trainer)
    return (
        f". To do the step again: python train.py fit --config {folder / CONFIG} --ckpt_path {path} --trainer.default_root_dir "
        f"{folder / 'non_finite' / 'again'} --trainer.max_steps {trainer.global_step + 1} --trainer.detect_anomaly true"
    )
