"""What is not finite never reaches the optimizer, nor a checkpoint; its rows are named, and the step can be done again."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from datamodules.batch import Batch
from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.multimodal import MultiModalLitModule, Stage
from models.manifest import fault
from tests.faults.small_runs import end_state, fit, make_module, same
from tests.lightning_modules.processes import MakeStrategy, ddp, flat, gathered, in_two_processes, zero, zero3
from tests.lightning_modules.run_fakes import Watch, weights, write_rows
from tests.lightning_modules.test_strategies import fsdp, split

Place = Literal["pixel", "activation", "loss", "gradient"]


class Poisoned(MultiModalLitModule):
    """Something is not finite in each batch with one of some rows."""

    ids: frozenset[str] = frozenset()
    place: Place = "pixel"

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        is_bad = bool(self.ids & {example["id"] for example in batch["examples"]})
        if is_bad and self.place == "pixel":
            batch["image"]["media"].fill_(math.nan)
        hooks = []
        if is_bad and self.place == "activation":
            projector = self.parts()["image_projector"]
            hooks.append(projector.register_forward_hook(lambda *args: (args[2][0] * math.inf, args[2][1])))
        loss = super().step(batch, stage)
        for hook in hooks:
            hook.remove()
        if loss is None:  # a process without a row in the last batch
            return None
        if is_bad and self.place == "gradient":
            loss[0].register_hook(lambda gradient: gradient * math.inf)
        return (loss[0] * math.nan, loss[1]) if is_bad and self.place == "loss" else loss


Make = Callable[..., Poisoned]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 9)


@pytest.fixture
def make(tiny_llm: Path, tiny_clip: Path) -> Make:
    def poisoned(place: Place | None, **options: Any) -> Poisoned:
        module = make_module(tiny_llm, tiny_clip, Poisoned, **options)
        assert isinstance(module, Poisoned)
        module.place, module.ids = place or "pixel", frozenset({"6"} if place else ())
        return module

    return poisoned


PLACES = [("pixel", [7, 8]), ("activation", [7, 8]), ("loss", [7, 8]), ("gradient", [5, 6, 7, 8])]
IN_ORDER = {"shuffle": False}


@pytest.mark.parametrize(("place", "lines"), PLACES)
def test_it_stops_before_the_step_which_can_be_done_again(
    make: Make, rows: Path, tmp_path: Path, place: Place, lines: list[int]
) -> None:
    clean, module = make(None), make(place)
    fit(clean, tmp_path / "clean", rows, data=IN_ORDER, max_steps=1)
    named = ", ".join(f".*rows\\.jsonl:{line}" for line in lines)
    message = rf"the {'gradient' if place == 'gradient' else 'loss'} of step 1 is not finite \(loss .*; rows {named}\)"
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path / "run", rows, data=IN_ORDER)
    assert same(weights(module), weights(clean))
    assert {state["step"].item() for state in module.trainer.optimizers[0].state.values()} == {1}

    kept = tmp_path / "run/non_finite/step=1.ckpt"
    assert fault(kept) == "" and torch.load(kept, weights_only=True)["global_step"] == 1
    again = make(place)
    with pytest.raises(ValueError, match=message):
        fit(again, tmp_path / "again", rows, data=IN_ORDER, resume=kept, max_steps=2)
    assert same(weights(again), weights(clean))
    well = make(None)
    fit(well, tmp_path / "well", rows, data=IN_ORDER, resume=kept)
    whole = make(None)
    fit(whole, tmp_path / "whole", rows, data=IN_ORDER)
    assert same(end_state(tmp_path / "well"), end_state(tmp_path / "whole"))


@pytest.mark.parametrize("place", ["pixel", "gradient"])
def test_it_is_left_out_where_that_is_asked_for(make: Make, rows: Path, tmp_path: Path, place: Place) -> None:
    module = make(place, on_non_finite="skip")
    seen: list[dict[str, Tensor]] = []
    watch = Watch(lambda trainer, module: seen.append(weights(module)))
    with pytest.warns(UserWarning, match=r"of step 1 is not finite .* The step is left out"):
        trainer = fit(module, tmp_path / "run", rows, watch, data=IN_ORDER, max_epochs=1)
    after_first, after_bad, after_last = seen[1], seen[3], seen[4]
    assert same(after_first, after_bad) and not same(after_bad, after_last)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after_last.values())
    assert {state["step"].item() for state in trainer.optimizers[0].state.values()} == {2} and trainer.global_step == 3


def test_many_in_a_row_stop_the_run(make: Make, rows: Path, tmp_path: Path) -> None:
    module = make("loss", on_non_finite="skip")
    module.ids = frozenset(map(str, range(9)))
    with pytest.raises(ValueError, match="^10 steps in a row; the loss of step 9 is not finite"), pytest.warns(UserWarning):
        fit(module, tmp_path, rows, accumulate_grad_batches=1, max_epochs=3)
    assert len(list((tmp_path / "non_finite").glob("*.ckpt"))) == 3


def test_no_checkpoint_holds_what_is_not_finite(make: Make, rows: Path, tmp_path: Path) -> None:
    class Breaks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            if module.trainer.global_step == 2:
                self.param_groups[0]["params"][0].data.view(-1)[3] = math.nan
            return loss

    module = make(None, optimizer=lambda groups: Breaks(groups, lr=0.1))
    with pytest.raises(ValueError, match=r"^\w+\.\S+ is not finite after step 3: .* takes no checkpoint's place"):
        fit(module, tmp_path, rows, checkpoint=RunCheckpoint(every_n_train_steps=1))
    (last,) = (tmp_path / "checkpoints").glob("last.ckpt")
    assert fault(last) == "" and torch.load(last, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    ("policy", "place", "how"),
    [
        ("stop", "loss", ddp),
        ("skip", "loss", ddp),
        pytest.param("stop", "loss", zero, marks=pytest.mark.slow),
        pytest.param("skip", "gradient", zero, marks=pytest.mark.slow),
        pytest.param("stop", "loss", fsdp, marks=pytest.mark.slow),
        pytest.param("skip", "gradient", fsdp, marks=pytest.mark.slow),
        pytest.param("stop", "loss", flat, marks=pytest.mark.slow),
        pytest.param("skip", "gradient", flat, marks=pytest.mark.slow),
        pytest.param("skip", "loss", split, marks=pytest.mark.slow),
        pytest.param("stop", "loss", zero3, marks=pytest.mark.slow),
        pytest.param("skip", "gradient", zero3, marks=pytest.mark.slow),
    ],
)
def test_processes_decide_together(make: Make, rows: Path, tmp_path: Path, policy: Any, place: Place, how: MakeStrategy) -> None:
    """Row 6 is on one process only; one that left its step out alone would wait for the other, or differ from it."""

    if how in (zero, zero3):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")

    def job(folder: Path, strategy: dict[str, Any]) -> None:
        module = make(place, on_non_finite=policy)
        data = IN_ORDER | {"batch_size": 2 if how is split else 1}
        trainer = fit(module, folder, rows, data=data, **strategy, accumulate_grad_batches=1)
        with gathered(module):
            torch.save(weights(module), folder / f"{trainer.global_rank}.pt")

    codes = in_two_processes(partial(job, tmp_path / "two"), strategy=how)
    assert codes == ([1, 1] if policy == "stop" else [0, 0])
    assert fault(tmp_path / "two/non_finite/step=3.ckpt") == ""
    if policy == "skip":
        first, second = (torch.load(tmp_path / f"two/{rank}.pt", weights_only=True) for rank in range(2))
        assert same(first, second) and all(bool(torch.isfinite(tensor).all()) for tensor in first.values())
