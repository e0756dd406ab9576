"""What a run needs to go on as if it had not stopped: its place in the data, and its random generators."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.fingerprint import differences
from datamodules.loading import RowDataModule
from datamodules.processor import Processor
from lightning_modules.due_validation import hold, is_due
from lightning_modules.loss_scale import compare_scales
from lightning_modules.run_summary import num_with_same_rows
from models.spread import local


@dataclass(frozen=True)
class StepStart:
    """Where a run stood when the first batch of an optimizer step began.

    A checkpoint that is written before the step is over holds the weights from before it. So it also must hold this place in
    the data and these random generators: the resumed run takes the step from its beginning.
    """

    global_step: int
    rng: dict[str, Any]
    fit_loop: dict[str, Any]
    datamodule: dict[str, Any] | None

    @classmethod
    def now(cls, trainer: Trainer) -> "StepStart":
        """To be called when a batch begins."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
        place = None if datamodule is None else datamodule.state_dict()
        return cls(trainer.global_step, rng_state(), trainer.fit_loop.state_dict(), place)

    def is_open(self, trainer: Trainer) -> bool:
        """Whether the weights are still those of the beginning."""
        return trainer.global_step == self.global_step

    def rewind(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Sets a checkpoint back to the beginning of the step."""
        checkpoint["rng"] = self.rng
        checkpoint["loops"]["fit_loop"] = self.fit_loop
        if self.datamodule is not None:
            name = type(trainer.datamodule).__qualname__  # type: ignore[attr-defined]  # Lightning's key
            checkpoint[name] = self.datamodule


def check_processor(now: Processor, files: Mapping[str, bytes], resumes: bool) -> None:
    """Compares the processor of a run with that of the checkpoint that it goes on from.

    Args:
        now: The run's.
        files: The checkpoint's.
        resumes: Training goes on; otherwise the checkpoint is only looked at, which another prompt may be meant for.

    Raises:
        ValueError: Training would go on with other examples than it began with.
    """
    if now.files() == files or not (changed := differences(now, Processor.from_files(files))):
        return
    if resumes:
        raise ValueError(
            f"the checkpoint was trained on other examples than this run would make: {'; '.join(changed)}. Set that back, or "
            "start another run from its weights with model.init_from"
        )
    rank_zero_warn(f"the checkpoint was trained on other examples than it is now shown: {'; '.join(changed)}")


def rng_state() -> dict[str, Any]:
    """The state of the random generators of this process and its device: torch's, Python's and NumPy's."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()  # a checkpoint holds nothing but tensors and plain Python
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy, **cuda}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Sets the random generators to a state that `rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def add_place(checkpoint: dict[str, Any], trainer: Trainer, step_start: StepStart | None) -> None:
    """Adds `rng`, the random generators of all processes, which must meet here, `wandb_run_id` and `accumulate_grad_batches`; and
    adds up what their data modules say. Processes that split a model's layers between them have the same of both, and count once.

    Args:
        checkpoint: Of this process; the first one writes it for all of them.
        trainer: Of the run.
        step_start: Where the step at hand began, which the checkpoint is set back to if that is not over; None: there is none.

    Raises:
        ValueError: A weight, or a value of the optimizer, is not finite, on this process or another.
    """
    checkpoint["rng"] = rng_state()
    runs = [logger.version for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    checkpoint["wandb_run_id"] = runs[0] if runs else None
    checkpoint["accumulate_grad_batches"] = trainer.accumulate_grad_batches
    if step_start is not None and step_start.is_open(trainer):
        step_start.rewind(checkpoint, trainer)
    elif is_due(trainer):
        hold(checkpoint)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, not declared
    name = type(datamodule).__qualname__ if isinstance(datamodule, RowDataModule) else ""
    problem = non_finite(checkpoint["state_dict"]) or non_finite(checkpoint.get("optimizer_states", []))
    states: list[Any] = [(checkpoint["rng"], checkpoint.get(name), problem)] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(states, states[0])
    if broken := [problem for *_, problem in states if problem]:
        raise ValueError(
            f"{broken[0]} is not finite after step {trainer.global_step:,}: what was trained is of no use, and takes no "
            "checkpoint's place. Go on from an earlier one in another precision, or start another run from it with "
            "model.init_from and a lower learning rate"
        )
    states = states[:: num_with_same_rows(trainer)]
    checkpoint["rng"] = [rng for rng, *_ in states]
    if name in checkpoint:
        checkpoint[name] = datamodule.together([place for _, place, _ in states])
        # Lightning keeps the loader's state too, of the first process alone, and would load it over that of the data module
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)


def non_finite(state: Any, name: str = "") -> str:
    """The first tensor in nested lists and dictionaries that is not finite, by name; empty where all are."""
    if isinstance(state, Tensor):
        is_fine = not state.is_floating_point() or bool(torch.isfinite(local(state)).all())
        return "" if is_fine else name
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return next((found for key, value in items if (found := non_finite(value, f"{name}.{key}".strip(".")))), "")


def take_place(checkpoint: dict[str, Any], trainer: Trainer) -> Mapping[str, Any]:
    """Takes up what `add_place` added.

    Args:
        checkpoint: Lightning has not read its loops yet: how many batches of the epoch are done is put in batches of this run, of
            which a step may have more or fewer.
        trainer: Of the run.

    Returns:
        The random generators of this process, the same on all that split a model's layers between them.
    """
    compare_scales(checkpoint, trainer)
    done: dict[str, int] = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    # rounded up: a place that is in no batch of this run is the end of the epoch, whose last step may be of fewer batches
    batches = -(-done["processed"] * trainer.accumulate_grad_batches // checkpoint["accumulate_grad_batches"])
    more = batches - done["processed"]
    for name in done:  # those that have begun are a batch further, or those that are complete a batch behind
        done[name] += more
    states: Sequence[Mapping[str, Any]] = checkpoint["rng"]
    together = num_with_same_rows(trainer)
    if len(states) != (number := trainer.world_size // together):
        rank_zero_warn(
            f"the checkpoint is of {len(states)} process(es), or groups of them that split layers, and goes on in {number}: the "
            "rows come in the same batches, but dropout draws other numbers than it would have"
        )
    return states[trainer.global_rank // together % len(states)]


def settle_place(trainer: Trainer) -> None:
    """Puts right what Lightning counts, when training begins.

    Of a step that a checkpoint was set back to the beginning of, it leaves the batch that had begun in the count of all batches,
    by which `val_check_interval` goes without regard to epochs, and counts the step as one that was logged. At the end of an
    epoch `take_place` may have counted more batches than this run has.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    current, total = loop.batch_progress.current, loop.batch_progress.total
    if loop.batch_progress.is_last_batch:
        for name, number in vars(current).items():
            setattr(current, name, min(number, trainer.num_training_batches))
    if total.started < total.ready:
        loop._batches_that_stepped -= not loop._should_accumulate()
        total.ready = total.started
    if trainer.fit_loop.restarting and any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        rank_zero_warn(
            "in the epoch that the run goes on in, Lightning does not show ReduceLROnPlateau its metric: the learning rate may "
            "fall an epoch later than it would have"
        )
