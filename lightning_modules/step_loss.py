"""The loss of an optimizer step: divided once, by all its supervised tokens, whatever batches and processes they came in.

Shape suffixes: K terms of a loss, 2 sum and count.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from datamodules.batch import Batch
from datamodules.collate import collate
from datamodules.loading import RowDataModule
from datamodules.step_counts import Counts
from lightning_modules.checkpoints import save_together
from lightning_modules.run_folder import CONFIG, run_folder
from models.spread import local

OnNonFinite = Literal["stop", "skip"]
_MOST_DUMPS = 3
_MOST_IN_A_ROW = 10


class StepLoss:
    """Sum and count of the loss terms of an optimizer step.

    Lightning divides each micro-batch by `accumulate_grad_batches` and averages over processes: a mean of means, in which
    tokens of short answers weigh more. Instead each micro-batch goes backward with its sum, and the gradients are divided
    by the step's count before they are clipped: 8 x 1 = 1 x 8, up to rounding.

    The terms of a loss may count different things (pairs, and tokens of chosen answers). Then one division does not serve, and
    each batch goes backward with the share of each term in the mean of the step, for which the data side counts ahead.

    Args:
        on_non_finite: What to do with a step whose loss or gradients are not finite: no weight changes in any case.
    """

    def __init__(self, on_non_finite: OnNonFinite = "stop") -> None:
        self.on_non_finite = on_non_finite
        self._num_terms = 1
        self._num_dumps = self._in_a_row = 0
        self.reset()

    def prepare(self, trainer: Trainer, counts: Counts) -> None:
        """Has the data side count ahead, where that is needed.

        Args:
            trainer: The trainer.
            counts: Counts a batch, by term, before it is run.

        Raises:
            ValueError: The data module cannot.
        """
        self._num_terms = len(counts(collate([], pad_id=0)))
        if self._num_terms == 1 or not trainer.training:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        if not isinstance(datamodule, RowDataModule):
            raise ValueError(
                f"the loss has {self._num_terms} terms with counts of their own, for which the data must count ahead: take a "
                f"data module of datamodules, or a subclass of RowDataModule, got {type(datamodule).__name__}"
            )
        datamodule.step_counts = counts

    def shares(self, batch: Batch, trainer: Trainer) -> Tensor:
        """The factor of each term's sum in a batch, so that dividing by the first count of the step gives each its mean: share_K.

        The processes must meet here, where there are several terms. Weights that `model.reward_criteria` give to pairs are not
        known ahead: where their mean in a step is m, the terms after the first are divided by m.
        """
        if self._num_terms == 1:
            return torch.ones((), device=trainer.strategy.root_device)
        own_K = batch["step_counts"].expand(self._num_terms).to(trainer.strategy.root_device, copy=True)
        counts_K = trainer.strategy.reduce(own_K, reduce_op="sum")
        return torch.where(counts_K > 0, counts_K[0] / counts_K, 0.0)

    def reset(self) -> None:
        """Begins a new step."""
        self._sums: list[Tensor] = []
        self._rows: list[list[dict[str, Any]]] = []

    def add(self, result: tuple[Tensor, Tensor] | None, share_K: Tensor, rows: list[dict[str, Any]] | None) -> Tensor | None:
        """Adds a micro-batch.

        Args:
            result: The sum and the count of its loss, of each term; None: it has none.
            share_K: From `shares`.
            rows: Its rows; None: they must not count.

        Returns:
            What is to go backward; None: nothing.
        """
        if result is None:
            return None
        total = (result[0] * share_K).sum()
        if rows is None:
            return 0 * total
        self._sums.append(torch.stack([x.detach().reshape(-1).to(total.device, torch.float32) for x in result]))
        self._rows.append(rows)
        return total

    def divide(self, trainer: Trainer, parameters: Iterable[nn.Parameter]) -> Tensor | None:
        """Divides the gradients by the step's count, over all processes, and begins a new step.

        Args:
            trainer: The trainer whose processes take part.
            parameters: What may have gradients. A step that is skipped leaves them none, so that the optimizer does nothing.

        Returns:
            The mean loss of the step, or None where nothing was added, or it is skipped.

        Raises:
            ValueError: The loss or a gradient is not finite, on this process or another. No weight has changed.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [local(parameter.grad) for parameter in trained if parameter.grad is not None]
        nothing = torch.zeros(2, self._num_terms, device=trainer.strategy.root_device)
        sums = torch.stack([nothing, *self._sums]).sum(0).flatten()
        # the gradients of float16 overflow now and then: its scaler sees that, and leaves the step out
        broken = sums.new_zeros(1) if trainer.precision == "16-mixed" else _num_broken(gradients).to(sums)
        # one exchange, and one look at the device, for the whole step
        *numbers, num_broken = trainer.strategy.reduce(torch.cat([sums, broken]), reduce_op="sum").tolist()
        totals, counts = numbers[: self._num_terms], numbers[self._num_terms :]
        loss = sum(total / (count or 1.0) for total, count in zip(totals, counts, strict=True))
        is_finite = math.isfinite(loss) and not num_broken
        if not is_finite:
            self._refuse(trainer, loss, num_broken > 0)
            for parameter in trained:
                parameter.grad = None
        self.reset()
        if not is_finite or counts[0] == 0:
            return None
        self._in_a_row = 0
        torch._foreach_mul_(gradients, trainer.world_size / counts[0])
        return sums.new_tensor(loss)

    def _refuse(self, trainer: Trainer, loss: float, in_gradients: bool) -> None:
        """Names the rows, keeps what it takes to do the step again, and stops the run where it is not to go on."""
        step, self._in_a_row = trainer.global_step, self._in_a_row + 1
        broken = [rows for rows, sums in zip(self._rows, self._sums, strict=True) if not bool(torch.isfinite(sums[0]).all())]
        names: list[Any] = [_names(sum(broken, [])), _names(sum(self._rows, []))]
        if trainer.world_size > 1:
            of_all: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(of_all, names)
            names = [sum(column, []) for column in zip(*of_all, strict=True)]
        rows = names[0] or names[1]  # a gradient alone may be of any row of the step
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        what = "the gradient" if math.isfinite(loss) and in_gradients else "the loss"
        told = f"{what} of step {step:,} is not finite (loss {loss}; rows {shown or 'none'}). No weight has changed"
        if self._num_dumps < _MOST_DUMPS:
            self._num_dumps += 1
            told += _keep(trainer, run_folder(trainer) / "non_finite" / f"step={step}.ckpt")
        if self.on_non_finite == "stop" or self._in_a_row >= _MOST_IN_A_ROW:
            in_a_row = f"{self._in_a_row} steps in a row; " if self.on_non_finite == "skip" else ""
            raise ValueError(
                f"{in_a_row}{told}. Lower the learning rate, clip gradients with trainer.gradient_clip_val, avoid 16-mixed and "
                "16-true, look at these rows, or set model.on_non_finite to skip to leave such steps out"
            )
        rank_zero_warn(f"{told}. The step is left out, since model.on_non_finite is skip")


def _num_broken(gradients: Sequence[Tensor]) -> Tensor:
    """1 where a gradient, or the shard of it that is here, is not finite, otherwise 0, as a tensor of one element."""
    largest = nn.utils.get_total_norm([gradient for gradient in gradients if gradient.numel()], norm_type=math.inf)
    return (~torch.isfinite(largest)).reshape(1)


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
