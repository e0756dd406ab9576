"""The loss of an optimizer step: divided once, by all its supervised tokens, whatever batches and processes they came in.

Shape suffixes: K terms of a loss, 2 sum and count.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from datamodules.batch import Batch
from datamodules.collate import collate
from datamodules.loading import RowDataModule
from datamodules.step_counts import Counts
from lightning_modules.loss_scale import Overflows, scaler_of
from lightning_modules.non_finite import NonFiniteSteps, OnNonFinite
from lightning_modules.zero import ZeroStrategy
from models.spread import local


class StepLoss:
    """Sum and count of the loss terms of an optimizer step.

    Lightning divides each micro-batch by `accumulate_grad_batches` and averages over processes: a mean of means, in which
    tokens of short answers weigh more. Instead each micro-batch goes backward with its sum, and the gradients are divided
    by the step's count before they are clipped: 8 x 1 = 1 x 8, up to rounding.

    Where that does not serve, each batch goes backward with its share in the mean of the step, for which the data side counts
    ahead: where the terms of a loss count different things (pairs, and tokens of chosen answers), where an engine keeps the
    gradients to itself (`ZeroStrategy`), and where the loss is scaled for float16, which has no room for a sum.

    Args:
        on_non_finite: What to do with a step whose loss or gradients are not finite: no weight changes in any case.
    """

    def __init__(self, on_non_finite: OnNonFinite = "stop") -> None:
        self.non_finite = NonFiniteSteps(on_non_finite)
        self.overflows = Overflows()
        self._num_terms = 1
        self._of_engine = self._is_scaled = False
        self._count_ahead = torch.zeros(())
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
        self._of_engine = isinstance(trainer.strategy, ZeroStrategy)
        self._is_scaled = scaler_of(trainer) is not None
        if not trainer.training or not self._counts_ahead:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        if not isinstance(datamodule, RowDataModule):
            why = f"the loss has {self._num_terms} terms with counts of their own"
            why = f"trainer.precision is {trainer.precision}" if self._is_scaled else why
            why = "trainer.strategy is ZeroStrategy" if self._of_engine else why
            raise ValueError(
                f"{why}, for which the data must count ahead: take a data module of datamodules, or a subclass of RowDataModule, "
                f"got {type(datamodule).__name__}"
            )
        datamodule.step_counts = counts

    def shares(self, batch: Batch, trainer: Trainer) -> Tensor:
        """The factor of each term's sum in a batch, so that dividing by the first count of the step gives each its mean: share_K.

        Under an engine, which averages over processes, and where the loss is scaled, it gives each its mean without a division.
        The processes must meet here, where the data side counts ahead. Weights that `model.reward_criteria` give to pairs are not
        known then: where their mean in a step is m, the terms after the first are divided by m.
        """
        if not self._counts_ahead:
            return torch.ones((), device=trainer.strategy.root_device)
        own_K = batch["step_counts"].expand(self._num_terms).to(trainer.strategy.root_device, copy=True)
        counts_K = trainer.strategy.reduce(own_K, reduce_op="sum")
        self._count_ahead = counts_K[0]
        of_mean = self._of_engine or self._is_scaled
        return torch.where(counts_K > 0, (trainer.world_size if of_mean else counts_K[0]) / counts_K, 0.0)

    @property
    def _counts_ahead(self) -> bool:
        return self._of_engine or self._is_scaled or self._num_terms > 1

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
        if self._of_engine:  # it leaves a step out for its gradients alone
            total = total * torch.where(torch.isfinite(total.detach()), 1.0, math.nan)
        return total

    def divide(self, trainer: Trainer, parameters: Iterable[nn.Parameter]) -> Tensor | None:
        """Divides the gradients by the step's count, over all processes, and begins a new step.

        Args:
            trainer: The trainer whose processes take part.
            parameters: What may have gradients. A step that is skipped leaves them none, so that the optimizer does nothing.

        Returns:
            The mean loss of the step, or None where nothing was added, or it is skipped for more than an overflow.

        Raises:
            ValueError: The loss or a gradient is not finite, on this process or another. No weight has changed.
        """
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        gradients = [local(parameter.grad) for parameter in trained if parameter.grad is not None]
        loss, count = self._end(trainer, _num_broken(gradients))
        if count is None:
            for parameter in trained:
                parameter.grad = None
        elif count and gradients:
            # where the loss is scaled, they are those of the mean already, unless rows have weights
            factor = float(self._count_ahead) / count if self._is_scaled else trainer.world_size / count
            torch._foreach_mul_(gradients, factor)
        return loss

    def end(self, trainer: Trainer, was_applied: bool) -> Tensor | None:
        """Ends a step that an engine has made, or left out, and begins a new one.

        Args:
            trainer: The trainer whose processes take part.
            was_applied: Whether the gradients were finite.

        Returns:
            As `divide`.

        Raises:
            ValueError: The same.
        """
        return self._end(trainer, torch.tensor([float(not was_applied)]))[0]

    def _end(self, trainer: Trainer, num_broken: Tensor) -> tuple[Tensor | None, float | None]:
        """What `divide` returns, and the step's first count over all processes; None: it is not finite, and left out."""
        nothing = torch.zeros(2, self._num_terms, device=trainer.strategy.root_device)
        sums = torch.stack([nothing, *self._sums]).sum(0).flatten()
        # one exchange, and one look at the device, for the whole step
        *numbers, in_gradients = trainer.strategy.reduce(torch.cat([sums, num_broken.to(sums)]), reduce_op="sum").tolist()
        totals, counts = numbers[: self._num_terms], numbers[self._num_terms :]
        loss = sum(total / (count or 1.0) for total, count in zip(totals, counts, strict=True))
        is_finite = math.isfinite(loss) and not in_gradients
        is_overflow = math.isfinite(loss) and not is_finite and self.overflows.explain(trainer)
        if not is_finite and not is_overflow:
            pairs = zip(self._rows, self._sums, strict=True)
            of_loss = [rows for rows, sums in pairs if not bool(torch.isfinite(sums[0]).all())]
            self.non_finite.refuse(trainer, loss, in_gradients > 0, sum(of_loss, []), sum(self._rows, []))
        elif counts[0] and is_finite:
            self.non_finite.passed()
        self.reset()
        count = counts[0] if is_finite else None
        return sums.new_tensor(loss) if count or is_overflow else None, count


def _num_broken(gradients: Sequence[Tensor]) -> Tensor:
    """1 where a gradient, or the shard of it that is here, is not finite, otherwise 0, as a tensor of one element."""
    largest = nn.utils.get_total_norm([gradient for gradient in gradients if gradient.numel()], norm_type=math.inf)
    return (~torch.isfinite(largest)).reshape(1)
