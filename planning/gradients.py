"""Gradients and the state of an optimizer, as a step finds them and leaves them."""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_modules.optim import parameter_groups
from planning.allocations import GRADIENTS, Allocations
from planning.outline import Outline

STATES, UPDATE = "optimizer states", "the optimizer's step"


class Gradients:
    """Those of a device that has them whole, or a share of each (FSDP2).

    Args:
        outline: The module.
        allocations: Where they count.
        accumulates: A step has several batches.
        on_cpu: It is to run on a CPU, where optimizers take one weight after the other.
        share: What of each a device has.
    """

    def __init__(
        self, outline: Outline, allocations: Allocations, accumulates: bool, on_cpu: bool = False, share: float = 1.0
    ) -> None:
        self.outline = outline
        self.weights: list[nn.Parameter] = [weight for weight in outline.weights if weight.requires_grad]
        self.optimizer: Optimizer = outline.module.optimizer(parameter_groups(outline.module.parts()))
        self.allocations, self.accumulates, self.share = allocations, accumulates, share
        self._is_fused = False
        for group in self.optimizer.param_groups:
            if group.get("fused"):
                group["fused"], self._is_fused = False, True
            elif "foreach" in group and group["foreach"] is None:
                group["foreach"] = not on_cpu

    @property
    def on_host(self) -> Counter[str]:
        """Bytes that a device has in the memory of the machine instead, at the peak, by kind."""
        return Counter()

    @property
    def beside(self) -> Counter[str]:
        """Bytes that a device has besides what is allocated, by kind: weights that a forward pass keeps."""
        return Counter()

    def forward(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        return nullcontext()

    def update(self) -> None:
        """The end of the step before: its gradients are there, and the optimizer changes the weights."""
        with self.allocations:
            with self.allocations.kept_for(GRADIENTS, self.share):
                for weight in self.weights:
                    weight.grad = weight.new_empty(weight.shape)
            self.allocations.watch_gradients(self.weights, self.share)
            self.step(self.allocations)

    def step(self, memory: Allocations) -> None:
        """Steps the optimizer: off a CPU with all weights at once where it may; a fused one needs nothing besides its state."""
        with memory.kept_for(STATES, self.share):
            self.optimizer.step()
        if self._is_fused:
            memory.forget_peak()

    def begin(self) -> None:
        """Before a backward pass."""
        if not self.accumulates:
            self.optimizer.zero_grad()

    def end(self) -> None:
        """After it."""


class DroppedGradients(Gradients):
    """Those of a device that lets go of them at the end of a step, not before the next backward pass (`FlatShardedStrategy`)."""

    def update(self) -> None:
        super().update()
        self.begin()


class OffloadedGradients(Gradients):
    """Those of a device whose shards are in the memory of the machine (FSDP2), where the optimizer steps, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host = Allocations(self.allocations.mode)
        self.host.forget(self.weights)

    @property
    def on_host(self) -> Counter[str]:
        return apart(self.host.at_peak, self.host.held[STATES])

    def update(self) -> None:
        with self.host:
            with self.host.kept_for(GRADIENTS, self.share):
                for weight in self.weights:
                    weight.grad = weight.new_empty(weight.shape)
            self.step(self.host)
        self.allocations.watch_gradients(self.weights, 0.0)


def apart(at_peak: Counter[str], states: float) -> Counter[str]:
    """Whole bytes by kind, what a step of the optimizer takes apart from the state that it leaves."""
    found = at_peak.copy()
    found[UPDATE] += at_peak[STATES] - states  # type: ignore[assignment]  # a share of a storage need not be whole
    found[STATES] = states  # type: ignore[assignment]
    return Counter({kind: round(size) for kind, size in found.items() if round(size) > 0})
