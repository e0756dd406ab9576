"""What checkpoints hold, and that a run goes on from one as if it had never stopped."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor

from datamodules.batch import Batch
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.multimodal import MultiModalLitModule, Stage
from lightning_modules.samples import SamplePage
from models.language import Generation, LanguageModel
from models.manifest import fault, sweep
from models.multimodal import MultiModalModel
from tests.lightning_modules.run_fakes import batches, make_data, make_trainer, weights, write_rows

pytestmark = pytest.mark.usefixtures("seed")

FROZEN, FULL = Tune(mode="frozen"), Tune(mode="full")
DROPOUT = Tune(mode="lora", lora=LoRA(dropout=0.3))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 9)


@pytest.fixture
def make(tiny_llm: Path, tiny_clip: Path) -> Callable[..., MultiModalLitModule]:
    """`make(tune=..., projector_tune=..., llm=..., kind=...)`: an unbuilt module."""

    def module(
        tune: Tune = DROPOUT,
        projector_tune: Tune = FULL,
        llm: Path = tiny_llm,
        kind: type[MultiModalLitModule] = MultiModalLitModule,
        **options: Any,
    ) -> MultiModalLitModule:
        encoder, projector = HFVisionEncoder(str(tiny_clip), layer=-2), MLPProjector(tune=projector_tune)
        return kind(LanguageModel(str(llm), tune=tune), encoder, projector, **options)

    return module


Make = Callable[..., MultiModalLitModule]


def fit(
    module: MultiModalLitModule, folder: Path, rows: Path, *callbacks: Callback, resume: Path | None = None, **options: Any
) -> Path:
    """Fits, and returns its newest checkpoint."""
    torch.manual_seed(4)
    trainer = make_trainer(folder, RunCheckpoint(), *callbacks, plugins=[CheckpointFile()], **options)
    trainer.fit(module, make_data(module, rows), ckpt_path=resume, weights_only=True)
    return folder / "checkpoints/last.ckpt"


class TestContent:
    def test_is_what_trains_and_how_to_make_the_rest(self, make: Make, rows: Path, tmp_path: Path) -> None:
        module = make()
        path = fit(module, tmp_path, rows)
        checkpoint = torch.load(path, weights_only=True)
        names = checkpoint["state_dict"].keys()
        assert {name.split(".")[0] for name in names} == {"language_model", "image_projector"}
        assert all("lora_" in name for name in names if name.startswith("language_model"))
        own = weights(module)
        assert names == {name for name in own if "lora_" in name or name.startswith("image_projector")}
        assert all(torch.equal(tensor, own[name]) for name, tensor in checkpoint["state_dict"].items())
        assert checkpoint["model"] == module.model_spec()
        assert checkpoint["fingerprints"].keys() == {"language_model", "image_encoder", "image_projector", "fusion"}
        assert torch.equal(checkpoint["rng"][0]["cpu"], torch.get_rng_state())
        assert path.stat().st_size < 300_000 < sum(tensor.numel() * 4 for tensor in own.values())

    def test_another_frozen_base_is_refused(self, make: Make, rows: Path, tmp_path: Path, tiny_llm: Path) -> None:
        path = fit(make(), tmp_path / "run", rows, max_steps=1)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path / "llm")
        changed = AutoModelForCausalLM.from_pretrained(tiny_llm)
        with torch.no_grad():
            changed.model.norm.weight[3] += 0.5
        changed.save_pretrained(tmp_path / "llm")
        with pytest.raises(ValueError, match="frozen weights of language_model are not those"):
            fit(make(llm=tmp_path / "llm"), tmp_path / "other", rows, resume=path)

    def test_what_trains_must_be_the_same(self, make: Make, rows: Path, tmp_path: Path) -> None:
        path = fit(make(), tmp_path / "run", rows, max_steps=1)
        with pytest.raises(ValueError, match=r"does not fit the model.*model\.init_from"):
            fit(make(tune=FROZEN), tmp_path / "other", rows, resume=path)


class TestTwoStages:
    """LLaVA's: first the projector alone, then the projector with LoRA."""

    def test_the_second_starts_from_the_first(self, make: Make, rows: Path, tmp_path: Path) -> None:
        stage1 = make(tune=FROZEN)
        first = fit(stage1, tmp_path / "one", rows)
        assert {name.split(".")[0] for name in torch.load(first, weights_only=True)["state_dict"]} == {"image_projector"}
        stage2 = make(init_from=str(first))
        torch.manual_seed(77)
        stage2.configure_model()
        own = weights(stage2)
        assert all(torch.equal(own[name], tensor) for name, tensor in weights(stage1).items() if "projector" in name)
        second = fit(stage2, tmp_path / "two", rows)
        moved = {name for name, tensor in weights(stage2).items() if not torch.equal(tensor, own[name])}
        assert any("lora_B" in name for name in moved) and any("image_projector" in name for name in moved)
        self.check_rebuilds(stage2, second, rows)

    def test_a_part_that_is_frozen_then_is_kept(self, make: Make, rows: Path, tmp_path: Path) -> None:
        """The language model was trained whole in the first stage, so its weights are nowhere else."""
        first = fit(make(tune=FULL), tmp_path / "one", rows)
        stage2 = make(tune=FROZEN, projector_tune=FULL, init_from=str(first))
        second = fit(stage2, tmp_path / "two", rows)
        self.check_rebuilds(stage2, second, rows)

        resumed = make(tune=FROZEN, init_from=None)  # the first stage's file is needed no more
        fit(resumed, tmp_path / "two", rows, resume=second, max_epochs=2)
        frozen = {name: tensor for name, tensor in weights(resumed).items() if name.startswith("language_model")}
        assert all(torch.equal(tensor, weights(stage2)[name]) for name, tensor in frozen.items())
        self.check_rebuilds(resumed, tmp_path / "two/checkpoints/last.ckpt", rows)

    def test_the_projector_may_be_frozen(self, make: Make, rows: Path, tmp_path: Path) -> None:
        first = fit(make(tune=FROZEN), tmp_path / "one", rows)
        stage2 = make(projector_tune=FROZEN, init_from=str(first))
        second = fit(stage2, tmp_path / "two", rows)
        self.check_rebuilds(stage2, second, rows)
        trained = torch.load(first, weights_only=True)["state_dict"]
        assert all(torch.equal(weights(stage2)[name], tensor) for name, tensor in trained.items())

    def check_rebuilds(self, module: MultiModalLitModule, path: Path, rows: Path) -> None:
        torch.manual_seed(99)
        model = MultiModalModel.from_checkpoint(path)
        module.eval()
        with torch.no_grad():
            for batch in batches(make_data(module, rows))[:3]:
                assert torch.equal(model(batch), module(batch))


class Stops(MultiModalLitModule):
    """Fails in one of its batches, before or after it has drawn random numbers."""

    stop_at: int | None = None
    stop: Literal["before", "after"] = "before"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained: list[tuple[list[str], float]] = []

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        at = len(self.trained) == self.stop_at
        if at and self.stop == "before":
            raise ValueError("stopped")
        loss = super().step(batch, stage)
        if at:
            raise ValueError("stopped")
        assert loss is not None
        self.trained.append(([example["id"] for example in batch["examples"]], float(loss[0].detach())))
        return loss


class TestResume:
    @pytest.mark.parametrize("stop", ["before", "after"])
    @pytest.mark.parametrize(
        ("stop_at", "accumulate", "workers"),
        [(3, 1, 0), (5, 1, 0), (7, 1, 0), (3, 2, 0), (6, 2, 0), (9, 2, 0), (5, 3, 0), (5, 3, 1)],
    )
    def test_a_run_that_failed_goes_on(  # 5 batches an epoch
        self, make: Make, rows: Path, tmp_path: Path, stop: Any, stop_at: int, accumulate: int, workers: int
    ) -> None:
        def run(name: str, module: Stops, **options: Any) -> dict[str, Tensor]:
            torch.manual_seed(4)
            data = make_data(module, rows, num_workers=workers)
            checkpoint = RunCheckpoint(every_n_epochs=9)
            options |= {"max_epochs": 2, "accumulate_grad_batches": accumulate, "plugins": [CheckpointFile()]}
            resume = options.pop("resume", None)
            make_trainer(tmp_path / name, checkpoint, **options).fit(module, data, ckpt_path=resume, weights_only=True)
            return weights(module)

        whole, stopped, resumed = make(kind=Stops), make(kind=Stops), make(kind=Stops)
        expected = run("whole", whole)
        stopped.stop_at, stopped.stop = stop_at, stop
        with pytest.raises(ValueError, match="stopped"):
            run("stopped", stopped)
        ends = run("stopped", resumed, resume=tmp_path / "stopped/checkpoints/last.ckpt")
        again = sum(len(module.trained) for module in (stopped, resumed)) - len(whole.trained)
        assert 0 <= again < accumulate  # the step that was under way begins anew
        assert stopped.trained + resumed.trained[again:] == whole.trained
        assert resumed.trained == whole.trained[-len(resumed.trained) :]
        assert all(torch.equal(ends[name], tensor) for name, tensor in expected.items())
        steps = [module.trainer.fit_loop.epoch_loop._batches_that_stepped for module in (whole, resumed)]
        assert steps[0] == steps[1] == whole.trainer.global_step, "by which what is logged is placed"

    def test_a_scheduler_that_waits_for_a_metric_may_miss_one_and_says_so(self, make: Make, rows: Path, tmp_path: Path) -> None:
        def plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
            return ReduceLROnPlateau(optimizer, monitor="train/loss")

        path = fit(make(lr_scheduler=plateau), tmp_path / "run", rows, max_steps=3)
        with pytest.warns(UserWarning, match="does not show ReduceLROnPlateau its metric"):
            fit(make(lr_scheduler=plateau), tmp_path / "run", rows, resume=path, max_steps=4)

    def test_from_an_earlier_checkpoint_it_has_a_new_last_one(self, make: Make, rows: Path, tmp_path: Path) -> None:
        def run(max_steps: int, resume: Path | None = None) -> Path:
            module, folder = make(), tmp_path / "run"
            trainer = make_trainer(folder, RunCheckpoint(every_n_train_steps=1, save_top_k=-1), max_steps=max_steps)
            trainer.fit(module, make_data(module, rows), ckpt_path=resume, weights_only=True)
            return folder / "checkpoints"

        folder = run(4)
        run(2, folder / "epoch=0-step=1.ckpt")
        assert [path.name for path in folder.glob("last*")] == ["last.ckpt"]
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


class TestStopping:
    def test_before_the_first_step_nothing_is_saved(self, make: Make, rows: Path, tmp_path: Path) -> None:
        module = make(kind=Stops)
        module.stop_at = 0
        with pytest.raises(ValueError, match="stopped"):
            fit(module, tmp_path, rows)
        assert not list(tmp_path.rglob("*.ckpt"))

    def test_in_the_middle_of_an_update_nothing_is_saved(self, make: Make, rows: Path, tmp_path: Path) -> None:
        class HalfWay(torch.optim.SGD):
            steps = 0

            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                self.steps += 1
                if self.steps == 3:
                    raise ValueError("the power is out")
                return loss

        module = make(optimizer=lambda groups: HalfWay(groups, lr=0.1))
        with pytest.raises(ValueError, match="the power is out"):
            fit(module, tmp_path, rows)
        assert not list(tmp_path.rglob("*.ckpt"))

    def test_an_evaluation_that_fails_saves_nothing(self, make: Make, rows: Path, tmp_path: Path) -> None:
        module = make(kind=Stops)
        path = fit(module, tmp_path / "run", rows, max_steps=1)
        module.trained, module.stop_at = [], 0
        trainer = make_trainer(tmp_path / "other", RunCheckpoint())
        with pytest.raises(ValueError, match="stopped"):
            trainer.test(module, make_data(module, rows), ckpt_path=path, weights_only=True, verbose=False)
        assert not list((tmp_path / "other").rglob("*.ckpt"))

    def test_what_stopped_the_run_is_said_also_on_a_full_disk(self, make: Make, rows: Path, tmp_path: Path) -> None:
        class Full(CheckpointFile):
            def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                raise ValueError("no space left")

        module = make(kind=Stops)
        module.stop_at = 2
        trainer = make_trainer(tmp_path, RunCheckpoint(), plugins=[Full()])
        with pytest.raises(ValueError, match="stopped"), pytest.warns(UserWarning, match="no space left"):
            trainer.fit(module, make_data(module, rows))


def whole_files(folder: Path) -> list[str]:
    """The checkpoints of a folder, which holds nothing else but their manifests."""
    names = sorted(file.name for file in folder.iterdir())
    checkpoints = [name for name in names if name.endswith(".ckpt")]
    assert names == sorted([*checkpoints, *(f"{name}.manifest.json" for name in checkpoints)])
    assert not any(fault(folder / name) for name in checkpoints)
    return checkpoints


def test_it_takes_no_folder_but_that_of_the_run(tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(dirpath=tmp_path / "elsewhere")
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[checkpoint], accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match="checkpoint.dirpath is .*elsewhere, but a run keeps"):
        checkpoint.setup(trainer, LightningModule(), "fit")


class TestFile:
    def test_a_damaged_one_is_named(self, make: Make, rows: Path, tmp_path: Path) -> None:
        path = fit(make(), tmp_path / "run", rows, max_steps=1)
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read as a checkpoint"):
            fit(make(), tmp_path / "other", rows, resume=cut)

    def test_one_that_was_changed_is_named(self, make: Make, rows: Path, tmp_path: Path) -> None:
        path = fit(make(), tmp_path / "run", rows, max_steps=1)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=r"last\.ckpt is not what its manifest .*\.json says: it has .* bytes"):
            fit(make(), tmp_path / "run", rows, resume=path)
        path.with_name("last.ckpt.manifest.json").unlink()
        with pytest.raises(ValueError, match=r"last\.ckpt cannot be read as a checkpoint"):
            fit(make(), tmp_path / "run", rows, resume=path)

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ValueError, match=r"file/last\.ckpt cannot be written .*default_root_dir"):
            CheckpointFile().save_checkpoint({"a": 1}, tmp_path / "file/last.ckpt")

    def test_one_that_cannot_be_written_leaves_the_last_one(self, tmp_path: Path) -> None:
        path = tmp_path / "last.ckpt"
        CheckpointFile().save_checkpoint({"a": torch.arange(9)}, path)
        before = path.read_bytes()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # as a full disk: writing fails in the middle
        try:
            with pytest.raises(ValueError, match=r"last\.ckpt cannot be written \(File too large\).*default_root_dir"):
                CheckpointFile().save_checkpoint({"a": torch.zeros(100_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert path.read_bytes() == before
        assert whole_files(tmp_path) == ["last.ckpt"]

    def test_a_kill_while_it_is_written_leaves_the_last_one(self, tmp_path: Path) -> None:
        path = tmp_path / "last.ckpt"
        CheckpointFile().save_checkpoint({"a": torch.arange(9)}, path)
        before = path.read_bytes()
        child = os.fork()
        if child == 0:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # kills in the middle of a write
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
            CheckpointFile().save_checkpoint({"a": torch.zeros(100_000)}, path)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGXFSZ
        assert path.read_bytes() == before
        sweep(tmp_path)
        assert path.read_bytes() == before and whole_files(tmp_path) == ["last.ckpt"]


def test_looking_at_a_run_does_not_change_it(make: Make, rows: Path, tmp_path: Path) -> None:
    """Answers that are drawn take random numbers, and so does dropout."""

    def run(name: str, *callbacks: Callback, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(4)
        module = make(generation=Generation(max_new_tokens=4, temperature=1.0))
        data = make_data(module, rows, val_path=str(rows))
        make_trainer(tmp_path / name, *callbacks, max_steps=4, **options).fit(module, data)
        return weights(module)

    alone = run("alone", limit_val_batches=0)
    watched = run("watched", SamplePage(), val_check_interval=2)
    assert "step 4" in (tmp_path / "watched/samples.html").read_text()
    assert all(torch.equal(watched[name], tensor) for name, tensor in alone.items())


def test_a_look_whether_it_runs_writes_no_checkpoint(make: Make, rows: Path, tmp_path: Path) -> None:
    """It must not take the place of the last one of a run in the same folder."""
    module = make()
    kept = tmp_path / "checkpoints" / "last.ckpt"
    kept.parent.mkdir()
    kept.write_text("of a run")
    data = make_data(module, rows, val_path=str(rows))
    make_trainer(tmp_path, RunCheckpoint(monitor="val/loss"), fast_dev_run=2).fit(module, data)
    assert [*kept.parent.iterdir()] == [kept] and kept.read_text() == "of a run"
