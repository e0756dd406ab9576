"""The side of a LightningModule that knows which run it goes on with: what a checkpoint must have in common with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from encoders.base import Part
from lightning_modules.recipe import (
    check_objective,
    check_optimizer,
    describe,
    describe_optimizer,
    describe_options,
    describe_schedule,
    given_options,
    keep_how_computed,
    new_curve,
)
from lightning_modules.spread import SpreadLitModule
from models.checkpoint import peek, start_from

OBJECTIVE, OPTIMIZER = "objective", "optimizer"
"""What they are called in a checkpoint."""


class ResumableLitModule(SpreadLitModule):
    """A module that remembers its options, also those of a subclass, and refuses to go on with a run that had others.

    Attributes:
        free_options: Options that do not change what is learnt, or only where a run begins: a resumed one may have others. A
            subclass adds its own: `free_options = MultiModalLitModule.free_options | {"plot_every"}`.
        goes_on_from: The checkpoint that will be loaded, where that is known before the weights are made; from it, and not from
            `init_from`, it is known then which weights came from another run.
        init_from: The checkpoint that a run starts from.
    """

    free_options: ClassVar[frozenset[str]] = frozenset({"generation", "feature_cache", "init_from", "on_non_finite"})
    init_from: str | None
    goes_on_from: Path | None = None
    _options: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        module = super().__new__(cls)
        # now, since a constructor, or a run, may change what it was given
        module.__dict__["_options"] = describe_options(given_options(cls, args, kwargs), cls.free_options)
        return module

    def __init__(self) -> None:
        super().__init__()
        self._warm_started: set[str] = set()
        self._optimizer: dict[str, Any] | None = None
        self._going_on: dict[str, Any] | None = None

    def parts(self) -> dict[str, Part]:
        """The parts of the model by their path."""
        return self.model.parts()

    def objective(self) -> dict[str, Any]:
        """What is optimised, as JSON: `class_path`, `init_args`, and the `parts` that are not the model's."""
        # an option that is a module is what has become of it, such as of a reference that was left open
        made = {name: describe(type(child)) for name, child in self.named_children() if name in self._options}
        parts, of_model = self.parts(), self.model.parts()
        others = {name: part.spec() for name, part in parts.items() if name not in of_model}
        return {"class_path": describe(type(self)), "init_args": self._options | made, "parts": others}

    def start(self) -> None:
        """Puts the weights of `init_from` into the model; a run that goes on has them in its own checkpoint."""
        if self.goes_on_from is not None:
            self._warm_started = set(peek(self.goes_on_from).get("warm_started", ()))
        elif self.init_from is not None:
            self._warm_started, fresh = start_from(self.model, self.init_from)
            parts = sorted({name.split(".")[0] for name in fresh})
            rank_zero_info(f"{len(self._warm_started)} weights from {self.init_from}; new: {', '.join(parts) or 'nothing'}")

    def setup(self, stage: str) -> None:
        """Forgets the optimizer of a fit before."""
        if stage == "fit":
            self._optimizer = self._going_on = None

    def on_fit_start(self) -> None:
        """Notes the optimizer as it was asked for, before that of a checkpoint takes its place.

        Raises:
            ValueError: The checkpoint has another.
        """
        optimizers = self.trainer.optimizers if self.zero is None else [self.zero.optimizer]
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self._optimizer = {
            "optimizers": [describe_optimizer(optimizer) for optimizer in optimizers],
            "schedules": [describe_schedule(scheduler) for scheduler in schedules],
        }
        going_on, self._going_on = self._going_on, None
        if going_on is not None:
            self._compare_optimizer(going_on)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the run optimises, and how."""
        checkpoint[OBJECTIVE], checkpoint[OPTIMIZER] = self.objective(), self._optimizer
        checkpoint["warm_started"] = sorted(self._warm_started)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what `on_save_checkpoint` added.

        Raises:
            ValueError: Training would go on with another objective, or another optimizer.
        """
        self._warm_started = set(checkpoint["warm_started"])
        if self._trainer is not None and self._trainer.training:
            self.check_recipe(checkpoint)

    def check_recipe(self, checkpoint: Mapping[str, Any]) -> None:
        """Compares the objective with that of a checkpoint that training goes on from, and the optimizer as soon as there is one.

        Raises:
            ValueError: It has another.
        """
        if (saved := checkpoint.get(OBJECTIVE)) is None or checkpoint.get(OPTIMIZER) is None:
            rank_zero_warn("the checkpoint does not say which objective and optimizer it was trained with: they are not compared")
            return
        check_objective(self.objective(), saved)
        if self._optimizer is None:
            self._going_on = dict(checkpoint)
        else:
            self._compare_optimizer(checkpoint)

    def _compare_optimizer(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._optimizer is not None
        check_optimizer(self._optimizer, checkpoint[OPTIMIZER])
        if said := new_curve(self._optimizer, checkpoint[OPTIMIZER], checkpoint["global_step"]):
            rank_zero_info(said)
        optimizers = self.trainer.optimizers if self.zero is None else [self.zero.optimizer]
        for state, optimizer in zip(checkpoint.get("optimizer_states", ()), optimizers, strict=False):
            keep_how_computed(state["param_groups"], optimizer.param_groups)
