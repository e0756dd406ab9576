"""A run goes on with the objective and the optimizer that it began with, or not at all."""

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_modules.checkpoints import CheckpointFile
from lightning_modules.dpo import DPOLitModule
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.part_table import PartTable
from lightning_modules.references import SecondAdapter
from lightning_modules.simpo import SimPOLitModule
from models.generation import Generation
from tests.faults.small_runs import end_state, fit, make_module, same
from tests.lightning_modules import preference_fakes, test_strategies
from tests.lightning_modules.preference_fakes import write_pairs
from tests.lightning_modules.processes import in_two_processes, zero, zero3
from tests.lightning_modules.run_fakes import make_data, make_trainer, write_rows
from tests.lightning_modules.test_strategies import adam, fsdp, sharded, split

train = test_strategies.train  # a fixture


def adamw(lr: float = 1e-2, **options: Any) -> Any:
    return partial(torch.optim.AdamW, lr=lr, **options)


@dataclass(frozen=True)
class Focus:
    strength: float = 1.0


FOCUS = Focus()


class Focused(MultiModalLitModule):
    """What a researcher adds."""

    def __init__(self, *args: Any, sharpness: float = 1.0, focus: Focus = FOCUS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sharpness, self.focus = sharpness, focus


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 5)


@pytest.fixture(scope="module")
def run(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `Focused`, with AdamW: five batches an epoch."""
    folder = tmp_path_factory.mktemp("run")
    fit(make_module(tiny_llm, tiny_clip, Focused, optimizer=adamw()), folder, rows, **ONE)
    return folder


ONE: Any = {"data": {"batch_size": 1}, "accumulate_grad_batches": 1, "max_epochs": 1}


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (MultiModalLitModule, {}, r"with Focused \(.*\), but here the model is MultiModalLitModule.*--model\.init_from instead"),
        (Focused, {"sharpness": 2.0}, r"model\.sharpness = 1\.0, but here it is 2\.0\. A run goes on"),
        (Focused, {"focus": Focus(0.5)}, r"model\.focus = \{.*'strength': 1\.0\}, but here it is \{.*0\.5\}"),
        (Focused, {"optimizer": adamw(1e-4)}, r"lr = 0\.01, but here it is 0\.0001 \(of image_projector, "),
        (Focused, {"optimizer": adamw(weight_decay=0.3)}, r"weight_decay = 0\.01, but here it is 0\.3 \(of image_projector, "),
        (Focused, {"optimizer": partial(torch.optim.SGD, lr=1e-2)}, r"adamw\.AdamW as optimizer, but here it is .*SGD"),
        (Focused, {"lr_scheduler": preference_fakes.constant}, r"WarmupCosine as schedule, but here it is .*ConstantLR"),
    ],
)
def test_another_objective_or_optimizer_is_refused(
    tiny_llm: Path, tiny_clip: Path, rows: Path, run: Path, tmp_path: Path, kind: Any, options: Any, match: str
) -> None:
    module = make_module(tiny_llm, tiny_clip, kind, **({"optimizer": adamw()} | options))
    with pytest.raises(ValueError, match=match) as error:
        fit(module, tmp_path, rows, PartTable(), resume=run / "checkpoints/last.ckpt", **(ONE | {"max_epochs": 2}))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())  # its papers do not say what was refused


def test_it_goes_on_with_what_does_not_matter(tiny_llm: Path, tiny_clip: Path, rows: Path, run: Path, tmp_path: Path) -> None:
    """And with an optimizer that is computed in another way: in that way."""
    free: dict[str, Any] = {"on_non_finite": "skip", "generation": Generation(max_new_tokens=3)}
    module = make_module(tiny_llm, tiny_clip, Focused, optimizer=adamw(fused=True), **free)
    trainer = fit(module, tmp_path, rows, PartTable(), resume=run / "checkpoints/last.ckpt", **(ONE | {"max_epochs": 2}))
    assert trainer.global_step == 10
    assert all(group["fused"] for group in trainer.optimizers[0].param_groups)
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} >= {10.0}
    rates = {row["part"]: row["lr"] for row in json.loads((tmp_path / "parts.json").read_text())}
    assert rates["language_model"] == rates["image_projector"] == 1e-2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone says what is mapped")
def test_nothing_stays_in_the_file_of_the_checkpoint(
    tiny_llm: Path, tiny_clip: Path, rows: Path, run: Path, tmp_path: Path
) -> None:
    """Which another machine may replace: the states of the optimizer would end the process that looks at them."""
    path, mapped = run / "checkpoints/last.ckpt", []

    class Look(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            gc.collect()
            mapped.append(str(path) in Path("/proc/self/maps").read_text())

    fit(
        make_module(tiny_llm, tiny_clip, Focused, optimizer=adamw()),
        tmp_path,
        rows,
        Look(),
        resume=path,
        **(ONE | {"max_epochs": 2}),
    )
    assert mapped == [False] * 5


def test_a_longer_run_has_the_rates_of_one_that_was_so_long_from_its_beginning(
    tiny_llm: Path, tiny_clip: Path, rows: Path, run: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    def made() -> MultiModalLitModule:
        return make_module(tiny_llm, tiny_clip, Focused, optimizer=adamw())

    whole, resumed, two = Rates(), Rates(), ONE | {"max_epochs": 2}
    fit(made(), tmp_path / "whole", rows, whole, **two)
    fit(made(), tmp_path / "resumed", rows, resumed, resume=run / "checkpoints/last.ckpt", **two)
    assert len(whole.rates) == 10 and whole.rates[0] == 1e-2  # 3 % of 10 steps are none
    assert resumed.rates == whole.rates[5:]
    (said,) = [text for text in log.messages if text.startswith("the run is now one of 10 steps, and was one of 5:")]
    assert said.endswith("in the next step with 0.5 of the full rate instead of 0")
    log.clear()
    fit(made(), tmp_path / "resumed", rows, resume=tmp_path / "resumed/checkpoints/last.ckpt", **two)
    assert "the run is now" not in log.text


def test_a_checkpoint_from_before_they_were_kept_goes_on_and_says_so(
    tiny_llm: Path, tiny_clip: Path, rows: Path, run: Path, tmp_path: Path
) -> None:
    old = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    del old["objective"], old["optimizer"]
    torch.save(old, tmp_path / "old.ckpt")
    module = make_module(tiny_llm, tiny_clip, optimizer=adamw(1e-4))
    with pytest.warns(UserWarning, match="does not say which objective and optimizer it was trained with: they are not compared"):
        fit(module, tmp_path / "run", rows, PartTable(), resume=tmp_path / "old.ckpt", **(ONE | {"max_epochs": 2}))
    rates = {row["lr"] for row in json.loads((tmp_path / "run/parts.json").read_text()) if row["trainable"]}
    assert rates == {1e-2}  # those with which it was trained, not those that were asked for


def test_an_evaluation_may_look_at_a_checkpoint_of_another_objective(
    tiny_llm: Path, tiny_clip: Path, run: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    module = make_module(tiny_llm, tiny_clip, SimPOLitModule, beta=7.0, optimizer=partial(torch.optim.SGD, lr=1.0))
    trainer = make_trainer(tmp_path, plugins=[CheckpointFile()])
    data = make_data(module, pairs, val_path=str(pairs))
    (metrics,) = trainer.validate(module, data, ckpt_path=run / "checkpoints/last.ckpt", weights_only=True, verbose=False)
    assert metrics["val/loss"] > 0


class TestWarmStart:
    @pytest.mark.parametrize("init_from", [True, False])
    def test_a_resumed_run_does_not_need_it(self, tiny_llm: Path, tmp_path: Path, init_from: bool) -> None:
        """Nor whether it is named: the reference is the same one, a copy of the adapters that it began with."""
        rows, start = write_pairs(tmp_path / "pairs.jsonl", 4, pictures=False), tmp_path / "sft/checkpoints/last.ckpt"
        sft: Any = preference_fakes.make_module(MultiModalLitModule, tiny_llm, None)  # type: ignore[type-var]
        fit(sft, tmp_path / "sft", rows, **ONE)

        def dpo(folder: Path, max_epochs: int, start: Path | None, resume: Path | None = None) -> DPOLitModule:
            options = {"init_from": None if start is None else str(start), "lr_scheduler": preference_fakes.constant}
            module = preference_fakes.make_module(DPOLitModule, tiny_llm, None, **options)
            module.goes_on_from = resume  # as the command line sets it
            fit(module, folder, rows, resume=resume, **(ONE | {"max_epochs": max_epochs}))
            return module

        dpo(tmp_path / "whole", 2, start)
        dpo(tmp_path / "run", 1, start)
        start.rename(tmp_path / "elsewhere.ckpt")
        module = dpo(tmp_path / "run", 2, start if init_from else None, tmp_path / "run/checkpoints/last.ckpt")
        assert isinstance(module.reference, SecondAdapter)
        assert same(end_state(tmp_path / "whole"), end_state(tmp_path / "run"))

    def test_without_one_another_reference_is_refused(self, tiny_llm: Path, tmp_path: Path) -> None:
        """Where nobody says which checkpoint it will be, and so that a second adapter will be needed."""
        rows = write_pairs(tmp_path / "pairs.jsonl", 2, pictures=False)
        made = partial(preference_fakes.make_module, DPOLitModule, tiny_llm, None)
        fit(made(reference=SecondAdapter()), tmp_path, rows, **ONE)
        with pytest.raises(ValueError, match=r"reference = lightning_modules\.references\.SecondAdapter.*\.AdapterOff"):
            fit(made(), tmp_path / "two", rows, resume=tmp_path / "checkpoints/last.ckpt", **(ONE | {"max_epochs": 2}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "optimizer", "match"),
    [
        (fsdp, partial(torch.optim.SGD, lr=0.01, momentum=0.9), r"lr = 0\.05, but here it is 0\.01"),
        (partial(sharded, folder=True), adam, r"torch\.optim\.sgd\.SGD as optimizer, but here it is .*AdamW"),
        (split, partial(torch.optim.SGD, lr=0.05, momentum=0.5), r"momentum = 0\.9, but here it is 0\.5"),
        (zero, partial(torch.optim.SGD, lr=0.01, momentum=0.9), r"lr = 0\.05, but here it is 0\.01"),
        (zero3, adam, r"torch\.optim\.sgd\.SGD as optimizer, but here it is .*AdamW"),
    ],
    ids=["fsdp", "folder", "split", "zero", "zero3"],
)
def test_so_it_is_where_processes_have_shares(
    train: Callable[..., None], tmp_path: Path, strategy: Any, optimizer: Any, match: str
) -> None:
    def refused(folder: Path, how: dict[str, Any], **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            train(folder, how, **options)

    if strategy in (zero, zero3):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")
    batch_size = 2 if strategy is split else 1
    run = partial(in_two_processes, strategy=strategy, batch_size=batch_size)
    assert run(train, tmp_path / "run", max_steps=3) == [0, 0]
    resume = tmp_path / "run/checkpoints/last.ckpt"
    assert run(refused, tmp_path / "then", resume=resume, max_steps=5, optimizer=optimizer) == [0, 0]
    assert run(train, tmp_path / "on", resume=resume, max_steps=5) == [0, 0]
