"""Two processes on the CPU, which share one batch between them."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.batch import Batch
from datamodules.mixture import MixtureDataModule
from datamodules.source import Source
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.multimodal import MultiModalLitModule, Stage
from lightning_modules.run_summary import RunSummary
from models.cross_attention import GatedCrossAttentionFusion
from models.fusion import Fusion
from models.language import LanguageModel
from tests.encoders.audio_fakes import save_audio_model
from tests.lightning_modules.media_fakes import make_all, write_media_rows
from tests.lightning_modules.processes import in_two_processes
from tests.lightning_modules.run_fakes import make_data, make_trainer, weights, write_rows

Job = Callable[[Path, dict[str, Any]], None]


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


@pytest.fixture
def train(tiny_llm: Path, tiny_clip: Path) -> Callable[..., None]:
    """`train(folder, rows, strategy_options, kind=..., **data_options)`: fits, tests, and keeps weights and metrics."""

    def job(
        folder: Path,
        rows: Path,
        trainer_options: dict[str, Any],
        kind: type[MultiModalLitModule] = MultiModalLitModule,
        **data: Any,
    ) -> None:
        torch.manual_seed(4)
        language_model = LanguageModel(str(tiny_llm), tune=Tune(mode="lora", lora=LoRA(target_modules=("q_proj", "v_proj"))))
        module = kind(language_model, HFVisionEncoder(str(tiny_clip), layer=-2), MLPProjector(), optimizer=sgd)
        datamodule = make_data(module, rows, **data)
        trainer = make_trainer(folder, RunCheckpoint(), **trainer_options)
        trainer.fit(module, datamodule)
        (metrics,) = trainer.test(module, datamodule, verbose=False)
        torch.save(weights(module), folder / f"{trainer.global_rank}.pt")
        (folder / f"{trainer.global_rank}.json").write_text(json.dumps(metrics))

    return job


def kept(folder: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    return torch.load(folder / f"{rank}.pt", weights_only=True), json.loads((folder / f"{rank}.json").read_text())


def test_two_processes_do_what_one_does_with_twice_the_batch(train: Callable[..., None], tmp_path: Path) -> None:
    """Each row has as many supervised tokens; every fifth has no picture, so in some steps one of the two has none."""
    rows = write_rows(tmp_path / "rows.jsonl", 10, answers=["red"])
    train(tmp_path / "one", rows, {}, batch_size=2)
    assert in_two_processes(train, tmp_path / "two", rows, batch_size=1) == [0, 0]
    expected, metrics = kept(tmp_path / "one", 0)
    for rank in range(2):
        got, got_metrics = kept(tmp_path / "two", rank)
        for name, tensor in expected.items():
            assert torch.allclose(got[name], tensor, atol=1e-6), name
        for name in ("test/loss", "test/exact_match", "test/accuracy"):
            assert got_metrics[name] == pytest.approx(metrics[name], rel=1e-5)
    assert "test/media_gain" in metrics  # in batches of one row there is nothing to swap


def test_what_only_one_process_has_keeps_nobody_waiting(train: Callable[..., None], tmp_path: Path) -> None:
    """One of the two has no usable row at all in the first step, and none that is closed or has another's picture."""
    rows = write_rows(tmp_path / "rows.jsonl", 8, answers=["red", "It is a bus."])
    lines = rows.read_text().splitlines()
    lines[1], lines[3] = '{"messages": []}', "{}"
    rows.write_text("\n".join(lines) + "\n")
    options = {"batch_size": 2, "shuffle": False, "max_skipped": 0.5}
    assert in_two_processes(train, tmp_path, rows, **options) == [0, 0]
    (first, metrics), (second, other) = kept(tmp_path, 0), kept(tmp_path, 1)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert metrics == other
    assert metrics.keys() == {"test/loss", "test/exact_match", "test/accuracy", "test/media_gain"}


class Fails(MultiModalLitModule):
    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        if self.trainer.global_rank == 1 and self.trainer.global_step == 2:
            raise ValueError("only here")
        return super().step(batch, stage)


class Broken(MultiModalLitModule):
    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        loss = super().step(batch, stage)
        assert loss is not None
        broken = self.trainer.global_rank == 1 and self.trainer.global_step == 2
        return (loss[0] * float("nan"), loss[1]) if broken else loss


@pytest.mark.parametrize("kind", [Fails, Broken])
def test_an_error_of_one_process_ends_both(train: Callable[..., None], tmp_path: Path, kind: type[MultiModalLitModule]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 10)
    assert in_two_processes(train, tmp_path, rows, batch_size=1, kind=kind) == [1, 1]
    assert not list(tmp_path.glob("checkpoints/*.ckpt"))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    save_audio_model("whisper", folder)
    return folder


@pytest.fixture
def train_all(tiny_llm: Path, tiny_clip: Path, whisper: Path) -> Callable[..., None]:
    """`train_all(folder, rows, trainer_options, batch_size, fusion=None)`: fits a model of all modalities, keeps its weights."""

    def job(
        folder: Path, rows: Path, trainer_options: dict[str, Any], batch_size: int, fusion: Fusion | None = None, **more: Any
    ) -> None:
        torch.manual_seed(4)
        module = make_all(tiny_llm, tiny_clip, whisper, optimizer=sgd, fusion=fusion)
        data = make_data(module, rows, batch_size=batch_size, shuffle=False)
        trainer = make_trainer(folder, **{"max_steps": 3, **trainer_options, **more})
        trainer.fit(module, data)
        folder.mkdir(exist_ok=True)
        torch.save(weights(module), folder / f"{trainer.global_rank}.pt")

    return job


def one_kind_a_rank(path: Path, first: str, second: str) -> Path:
    """With batches of one row a process, the first process gets rows of one kind alone and the second one of the other."""
    return write_media_rows(path, [first, second] * 4)


@pytest.mark.parametrize(
    ("kinds", "accumulate", "fusion"),
    [
        (("a", ""), 1, None),
        (("a", ""), 2, None),  # of two batches only the second one's gradients are exchanged
        (("va", "i"), 1, None),
        (("a", ""), 1, GatedCrossAttentionFusion(every=1, num_heads=2, head_dim=8)),
    ],
)
def test_processes_with_rows_of_different_kinds_do_what_one_does(
    train_all: Callable[..., None], tmp_path: Path, kinds: tuple[str, str], accumulate: int, fusion: Fusion | None
) -> None:
    rows = one_kind_a_rank(tmp_path / "rows.jsonl", *kinds)
    options = {"fusion": fusion, "accumulate_grad_batches": accumulate, "max_steps": 4 // accumulate}
    train_all(tmp_path / "one", rows, {}, batch_size=2, **options)
    assert in_two_processes(train_all, tmp_path / "two", rows, batch_size=1, **options) == [0, 0]
    expected = torch.load(tmp_path / "one/0.pt", weights_only=True)
    for rank in range(2):
        got = torch.load(tmp_path / f"two/{rank}.pt", weights_only=True)
        for name, tensor in expected.items():
            assert torch.allclose(got[name], tensor, atol=1e-6), name


def test_without_the_touch_of_idle_parts_the_processes_wait_in_vain(
    train_all: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process offers the gradients of all encoders, of which the other one, with text alone, has none."""
    monkeypatch.setattr("lightning_modules.spread.touch_idle_parts", lambda loss, model, batch: loss)

    def job(*arguments: Any, **options: Any) -> None:
        try:
            train_all(*arguments, **options)
        except RuntimeError as error:
            (tmp_path / f"{os.environ['RANK']}.txt").write_text(str(error))
            raise

    rows = one_kind_a_rank(tmp_path / "rows.jsonl", "iva", "")
    assert in_two_processes(job, tmp_path / "two", rows, batch_size=1, timeout_seconds=3) == [1, 1]
    assert "Timed out waiting 3000ms" in "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert not list(tmp_path.rglob("*.pt"))


def test_two_processes_go_on_as_if_they_had_never_stopped(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """Their rows have prompts of different lengths, so that dropout draws other numbers on each of them."""

    def job(folder: Path, trainer_options: dict[str, Any], stop: bool = False, resume: bool = False) -> None:
        torch.manual_seed(4)
        tune = Tune(mode="lora", lora=LoRA(dropout=0.5))
        encoder, projector = HFVisionEncoder(str(tiny_clip), layer=-2), MLPProjector()
        steady = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)  # a cosine would end elsewhere in the run that stops
        module = MultiModalLitModule(
            LanguageModel(str(tiny_llm), tune=tune), encoder, projector, optimizer=sgd, lr_scheduler=steady
        )
        data = make_data(module, rows, batch_size=1, shuffle=False)
        checkpoint = RunCheckpoint(every_n_train_steps=2)
        trainer = make_trainer(folder, checkpoint, RunSummary(), **trainer_options, max_steps=2 if stop else 5)
        trainer.fit(module, data, ckpt_path=folder / "checkpoints/last.ckpt" if resume else None, weights_only=True)
        torch.save([weights(module), torch.get_rng_state()], folder / f"{trainer.global_rank}.pt")

    rows = write_media_rows(tmp_path / "rows.jsonl", ["i", "", "", "i", "i", "", "i", "", "i", "i"])
    assert in_two_processes(job, tmp_path / "whole") == [0, 0]
    assert in_two_processes(job, tmp_path / "stopped", stop=True) == [0, 0]
    assert in_two_processes(job, tmp_path / "stopped", resume=True) == [0, 0]
    for rank in range(2):
        (expected, generator), (got, other) = (
            torch.load(tmp_path / f"{name}/{rank}.pt", weights_only=True) for name in ("whole", "stopped")
        )
        assert torch.equal(generator, other)
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(generator, torch.load(tmp_path / "whole/0.pt", weights_only=True)[1])
    for name in ("whole", "stopped"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["trained"] == 10 and summary["media"] == {"image": 6, "video": 0, "audio": 0}


def test_metrics_and_sources_that_only_one_process_has_are_known_to_both(
    tiny_llm: Path, tiny_clip: Path, whisper: Path, tmp_path: Path
) -> None:
    def job(folder: Path, trainer_options: dict[str, Any], batch_size: int) -> None:
        torch.manual_seed(4)
        module = make_all(tiny_llm, tiny_clip, whisper)
        data = MixtureDataModule(sources, batch_size=batch_size, num_workers=0, processor=module.processor, max_skipped=0.5)
        trainer = make_trainer(folder, **trainer_options)
        (metrics,) = trainer.test(module, data, verbose=False)
        folder.mkdir(exist_ok=True)
        (folder / f"{trainer.global_rank}.json").write_text(json.dumps(metrics))

    paths = {name: write_media_rows(tmp_path / f"{name}.jsonl", kinds) for name, kinds in (("a", ["i"]), ("b", ["", "a", ""]))}
    lines = paths["b"].read_text().splitlines()
    paths["b"].write_text("\n".join([*lines[:2], "{"]) + "\n")  # of a, b, b, b the second process gets one row of b
    sources = {name: Source(test_path=str(path)) for name, path in paths.items()}
    job(tmp_path / "one", {}, batch_size=2)
    assert in_two_processes(job, tmp_path / "two", batch_size=1) == [0, 0]
    expected, first, second = (json.loads((tmp_path / name).read_text()) for name in ("one/0.json", "two/0.json", "two/1.json"))
    assert first == second and {"test/a/loss", "test/b/loss"} < first.keys() == expected.keys()
    assert first == pytest.approx(expected, rel=1e-5)
    named = [json.loads(line) for line in (tmp_path / "two/skipped.jsonl").read_text().splitlines()]
    assert [(row["source"], row["line"]) for row in named] == [("b", 3)]
