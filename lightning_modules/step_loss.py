"""The loss of an optimizer step: divided once, by all its supervised tokens, whatever batches and processes they came in."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from models.spread import local


class StepLoss:
    """Sum and count of the loss terms of an optimizer step.

    Lightning divides each micro-batch by `accumulate_grad_batches` and averages over processes: a mean of means, in which
    tokens of short answers weigh more. Instead each micro-batch goes backward with its sum, and the gradients are divided
    by the step's count before they are clipped: 8 x 1 = 1 x 8, up to rounding.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins a new step."""
        self._sums: list[Tensor] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, total: Tensor, count: Tensor, rows: list[dict[str, Any]]) -> None:
        """Adds a micro-batch: the sum of its loss terms, their number, and its rows."""
        self._sums.append(torch.stack([total.detach().float(), count.to(total.device, torch.float32)]))
        self._rows += rows

    def divide(self, trainer: Trainer, parameters: Iterable[nn.Parameter]) -> Tensor | None:
        """Divides the gradients by the step's count, over all processes, and begins a new step.

        Args:
            trainer: The trainer whose processes take part.
            parameters: What has gradients.

        Returns:
            The mean loss of the step, or None where nothing was added.

        Raises:
            ValueError: The loss is not finite, on this process or another. No weight has changed.
        """
        sums = torch.stack(self._sums).sum(0) if self._sums else torch.zeros(2, device=trainer.strategy.root_device)
        rows = self._rows
        self.reset()
        total, count = trainer.strategy.reduce(sums, reduce_op="sum")
        if not bool(torch.isfinite(total)):
            raise ValueError(_not_finite(float(total / count), rows, trainer.global_step))
        if count == 0:
            return None
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, trainer.world_size / float(count))
        return total / count


def _not_finite(loss: float, rows: list[dict[str, Any]], step: int) -> str:
    names = ", ".join(f"{row['file']}:{row['line']}" for row in rows) or "no row of this process"
    return (
        f"the loss of step {step:,} is {loss} (rows {names}). The weights are still those from before this step. Lower the "
        "learning rate, clip gradients with trainer.gradient_clip_val, avoid 16-mixed and 16-true, or look at these rows"
    )
