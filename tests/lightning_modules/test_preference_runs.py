"""Runs of objectives that compare answers: stopped and resumed, in two processes, and with kept log-probabilities."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from encoders.projectors import MLPProjector
from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.dpo import DPOLitModule
from lightning_modules.kto import KTOLitModule
from lightning_modules.mdpo import MDPOLitModule
from lightning_modules.precomputed import PrecomputedReference
from lightning_modules.preference import PreferenceLitModule
from lightning_modules.references import AdapterOff, FrozenCopy, Reference, SecondAdapter
from lightning_modules.reward_model import RewardLitModule
from lightning_modules.simpo import SimPOLitModule
from models.multimodal import MultiModalModel
from tests.lightning_modules.preference_fakes import make_module, sgd, write_pairs
from tests.lightning_modules.processes import in_two_processes
from tests.lightning_modules.run_fakes import make_data, make_trainer, weights

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("rows") / "rows.jsonl", 8)


class StopAt(Callback):
    """Stops a run with an error, as a signal would, after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


Make = Callable[[Path], PreferenceLitModule]


def all_weights(module: PreferenceLitModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        (DPOLitModule, AdapterOff),
        (DPOLitModule, SecondAdapter),
        (DPOLitModule, FrozenCopy),
        (DPOLitModule, PrecomputedReference),
        (MDPOLitModule, PrecomputedReference),
        (KTOLitModule, FrozenCopy),
        (RewardLitModule, None),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    kind: type[PreferenceLitModule],
    reference: type[Reference] | None,
    tiny_llm: Path,
    tiny_clip: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    def make(name: str) -> PreferenceLitModule:
        options: dict[str, Any] = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=0.01)}
        if reference in (FrozenCopy, PrecomputedReference):
            options["image_projector"] = MLPProjector()  # whose random start a checkpoint must hold
        if reference is not None:
            options["reference"] = (
                PrecomputedReference(str(tmp_path / name)) if reference is PrecomputedReference else reference()
            )
        return make_module(kind, tiny_llm, tiny_clip, **options)

    def fit(module: PreferenceLitModule, folder: str, *callbacks: Callback, ckpt_path: Path | None = None) -> None:
        data = make_data(module, rows, shuffle=True)
        make_trainer(tmp_path / folder, RunCheckpoint(), *callbacks, max_epochs=2).fit(module, data, ckpt_path=ckpt_path)

    torch.manual_seed(8)
    whole = make("a")
    fit(whole, "whole")
    torch.manual_seed(8)
    with pytest.raises(SystemExit):
        fit(make("b"), "parts", StopAt(5))
    torch.manual_seed(9)  # another start, which the checkpoint must replace
    resumed = make("b")
    fit(resumed, "parts", ckpt_path=tmp_path / "parts/checkpoints/last.ckpt")
    expected, got = all_weights(whole), all_weights(resumed)
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def test_a_checkpoint_holds_the_policy_alone(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    """It is used like any other: the reference is beside it."""
    module = make_module(DPOLitModule, tiny_llm, tiny_clip, reference=SecondAdapter(), optimizer=sgd())
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, make_data(module, rows))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("reference" in name for name in checkpoint["state_dict"])
    assert checkpoint["reference"] and all(".reference." in name for name in checkpoint["reference"])
    model = MultiModalModel.from_checkpoint(tmp_path / "last.ckpt")
    own = module.model.state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())


def test_a_sweep_over_beta_computes_the_reference_once(
    tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Whose weights are those that a live reference gives."""
    ends = {}
    for beta in (0.1, 0.5):
        for name in ("kept", "live"):
            torch.manual_seed(6)
            reference = PrecomputedReference(str(tmp_path / "logps")) if name == "kept" else None
            module = make_module(DPOLitModule, tiny_llm, tiny_clip, beta=beta, reference=reference, optimizer=sgd())
            data = make_data(module, rows, val_path=str(rows))
            trainer = make_trainer(tmp_path / f"{name}-{beta}", max_epochs=2)
            trainer.fit(module, data)
            ends[name, beta] = weights(module)
            if isinstance(module.reference, PrecomputedReference):
                computed = 0 if beta == 0.5 else 16
                assert (module.reference.num_computed, module.reference.num_read) == (computed, 64 - computed)
    for beta in (0.1, 0.5):
        assert all(torch.allclose(ends["kept", beta][name], end, atol=1e-6) for name, end in ends["live", beta].items())
    assert any(not torch.equal(ends["live", 0.1][name], end) for name, end in ends["live", 0.5].items())


def test_validation_fills_the_folder_beforehand(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> None:
    torch.manual_seed(6)
    first = make_module(DPOLitModule, tiny_llm, tiny_clip, reference=PrecomputedReference(str(tmp_path / "logps")))
    make_trainer(tmp_path).validate(first, make_data(first, rows, val_path=str(rows)), verbose=False)
    torch.manual_seed(6)  # the projector is random
    reading = PrecomputedReference(str(tmp_path / "logps"), of=FrozenCopy(), compute_missing=False)
    module = make_module(DPOLitModule, tiny_llm, tiny_clip, reference=reading)
    trainer = make_trainer(tmp_path / "fit")
    trainer.fit(module, make_data(module, rows))
    assert reading.num_read == 16 and math.isfinite(trainer.callback_metrics["train/loss"])
    assert not any("reference" in name for name in module.state_dict())  # no memory for a copy


def test_answers_that_change_at_random_cannot_be_kept(tiny_llm: Path, tmp_path: Path) -> None:
    module = make_module(KTOLitModule, tiny_llm, None, reference=PrecomputedReference(str(tmp_path)))
    with pytest.raises(ValueError, match="mismatched.*AdapterOff"):
        module.configure_model()
    make_module(
        KTOLitModule, tiny_llm, None, reference=PrecomputedReference(str(tmp_path)), loss_type="apo_zero_unpaired"
    ).configure_model()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DPOLitModule, {}),
        (DPOLitModule, {"reference": SecondAdapter}),
        (DPOLitModule, {"image_projector": MLPProjector}),
        (KTOLitModule, {}),
        (SimPOLitModule, {}),
        (RewardLitModule, {}),
    ],
)
def test_two_processes_do_what_one_does_with_twice_the_batch(
    kind: type[PreferenceLitModule], options: dict[str, Any], tiny_llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """Every fifth row has no picture. KTO's rows are so that each has a mismatched one on its own process."""
    rows = write_pairs(tmp_path / "rows.jsonl", 8)
    accumulate = 2 if kind is DPOLitModule else 1

    def job(folder: Path, trainer_options: dict[str, Any], batch_size: int) -> None:
        torch.manual_seed(4)
        made = {name: make() for name, make in options.items()}
        module = make_module(kind, tiny_llm, tiny_clip, optimizer=sgd(), **made)
        data = make_data(module, rows, batch_size=batch_size, val_path=str(rows), shuffle=False)
        trainer = make_trainer(folder, accumulate_grad_batches=accumulate, log_every_n_steps=1, **trainer_options)
        trainer.fit(module, data)
        folder.mkdir(exist_ok=True)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        (folder / f"{trainer.global_rank}.json").write_text(json.dumps(metrics))
        torch.save(weights(module), folder / f"{trainer.global_rank}.pt")

    job(tmp_path / "one", {}, batch_size=4)
    assert in_two_processes(job, tmp_path / "two", batch_size=2) == [0, 0]
    expected = torch.load(tmp_path / "one/0.pt", weights_only=True)
    metrics = json.loads((tmp_path / "one/0.json").read_text())
    for rank in range(2):
        got = torch.load(tmp_path / f"two/{rank}.pt", weights_only=True)
        if kind is not KTOLitModule:  # which rows are put against each other depends on the batch
            for name, tensor in expected.items():
                assert torch.allclose(got[name], tensor, atol=2e-6), name
            assert json.loads((tmp_path / f"two/{rank}.json").read_text()) == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        other = torch.load(tmp_path / "two/0.pt", weights_only=True)
        assert all(torch.equal(got[name], tensor) for name, tensor in other.items())


def test_the_point_of_kto_is_that_of_all_processes(tiny_llm: Path, tmp_path: Path) -> None:
    """One process has only skipped rows in its first batch, and keeps the other not waiting."""
    rows = write_pairs(tmp_path / "rows.jsonl", 8, pictures=False)
    lines = rows.read_text().splitlines()
    lines[1], lines[3] = '{"messages": []}', "{}"
    rows.write_text("\n".join(lines) + "\n")

    def job(folder: Path, trainer_options: dict[str, Any]) -> None:
        torch.manual_seed(4)
        module = make_module(KTOLitModule, tiny_llm, None, optimizer=sgd(0.5))
        seen: list[float] = []
        mean = module._mean
        module._mean = lambda pair: (seen.append(float(mean(pair))), mean(pair))[1]  # type: ignore[method-assign]
        trainer = make_trainer(folder, **trainer_options)
        trainer.fit(module, make_data(module, rows, batch_size=2, shuffle=False, max_skipped=0.5))
        folder.mkdir(exist_ok=True)
        (folder / f"{trainer.global_rank}.json").write_text(json.dumps(seen))

    assert in_two_processes(job, tmp_path / "two") == [0, 0]
    first, second = (json.loads((tmp_path / f"two/{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 2 and first[0] == 0 and first[1] != 0
