"""The loss scale of float16 (`trainer.precision 16-mixed`), and steps whose gradients are too large for it.

Gradients are computed from a loss times a factor, so that small ones are not rounded to 0 (arXiv 1710.03740, section 3.2). Where
large ones overflow, torch's `GradScaler` leaves the step out and halves the factor; in the first steps of a run it looks for the
factor in this way.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

STATE = MixedPrecision.__qualname__
"""Lightning's name for the state of the scaler, in a checkpoint."""
LOWEST = 1.0
"""A gradient that is not finite at a scale as low as that is no overflow: the scale does not make it larger."""


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """What scales the loss of a run; None: nothing does."""
    return scaler_in(trainer.precision_plugin)


def scaler_in(precision: Precision) -> torch.amp.GradScaler | None:
    """The same of Lightning's plugin for `trainer.precision`."""
    return precision.scaler if isinstance(precision, MixedPrecision) else None


def take_scale_off(trainer: Trainer, optimizer: Optimizer) -> None:
    """Divides gradients by the scale before they are looked at and clipped, also those of a fused optimizer.

    Lightning has done so for others, and leaves a fused one, which can do it itself, to its step.
    """
    scaler = scaler_of(trainer)
    if scaler is not None and _optimizer_handles_unscaling(optimizer):
        scaler.unscale_(optimizer)


class Overflows:
    """Tells gradients that overflow from those that are not finite at any scale, and counts steps left out for them."""

    def __init__(self) -> None:
        self._number = 0

    def explain(self, trainer: Trainer) -> bool:
        """Whether gradients that are not finite, of a loss that is, may be due to the scale: then the step is left out by it."""
        scaler = scaler_of(trainer)
        if scaler is None or (scale := scaler.get_scale()) <= LOWEST:
            return False
        if not self._number:
            # the scheduler goes on at such a step, as the data do, and torch would wonder about the first
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
            rank_zero_info(
                f"step {trainer.global_step:,}: gradients overflow float16 at a loss scale of {scale:,g}. Such a step changes no "
                "weight, the scale is lowered, and the run goes on; train/overflows counts them"
            )
        self._number += 1
        return True

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """`train/loss_scale`, of the step at hand, and `train/overflows`, since the fit began; none where no loss is scaled."""
        scaler = scaler_of(trainer)
        return {} if scaler is None else {"train/loss_scale": scaler.get_scale(), "train/overflows": float(self._number)}


def compare_scales(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Says so where a checkpoint and the run that goes on from it differ in whether the loss is scaled."""
    scaler = scaler_of(trainer)
    if scaler is not None and STATE not in checkpoint:
        rank_zero_warn(
            f"the checkpoint is of a run in another precision and goes on in {trainer.precision}: its loss scale begins at "
            f"{scaler.get_scale():,g}, and the first steps may be left out until it fits"
        )
    elif scaler is None and STATE in checkpoint:
        rank_zero_warn(f"the checkpoint is of a run in 16-mixed and goes on in {trainer.precision}, without its loss scale")
