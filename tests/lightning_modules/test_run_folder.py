"""When a fit may use a folder, and what it writes there."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from callback_fakes import FakeData, FakeModule, good_batch, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.run_folder import RunFolder, checkpoint_folder, write_text
from lightning_modules.run_lock import LOCK
from tests.forked import fork


class Fails(FakeModule):
    """Fails at one batch."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.fail_at = fail_at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.fail_at:
            raise RuntimeError("out of memory")
        return super().training_step(batch, batch_idx)


class CliModule(FakeModule):
    def __init__(self, rate: float = 1e-5) -> None:
        super().__init__()


class CliData(FakeData):
    def __init__(self) -> None:
        super().__init__([good_batch()] * 2, [good_batch()])


class Cli(LightningCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: options for name, options in LightningCLI.subcommands().items() if name != "test"}


def cli(command: str, folder: Path, *args: str) -> None:
    trainer = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    Cli(
        CliModule,
        CliData,
        save_config_callback=RunFolder,
        trainer_defaults=trainer | {"max_epochs": 1, "enable_checkpointing": False},
        auto_configure_optimizers=False,
        seed_everything_default=3,
        args=[command, f"--trainer.default_root_dir={folder}", *args],
    )


def fit(
    folder: Path,
    config: dict[str, Any] | None = None,
    module: FakeModule | None = None,
    epochs: int = 1,
    logger: Any = False,
    **save_config: bool,
) -> None:
    """Fits with what the CLI would hand over, without the second that its parser costs."""
    parser = LightningArgumentParser()
    parser.add_argument("--model.rate", type=float, default=1e-5)
    parser.add_argument("--seed_everything", type=int, default=3)
    parser.add_argument("--ckpt_path", type=str | None)
    options = parser.parse_object(config or {})
    callbacks = [ModelCheckpoint(folder / "checkpoints", save_last=True), RunFolder(parser, options, **save_config)]
    trainer = make_trainer(folder, callbacks, max_epochs=epochs, logger=logger, enable_checkpointing=True)
    trainer.fit(module or FakeModule(), datamodule=CliData(), ckpt_path=options.ckpt_path)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".ckpt")


def test_a_fit_writes_config_model_and_processor(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    fit(folder, {"model.rate": 0.5})
    assert files(folder) == [LOCK, "config.yaml", "model.json", "processor/processor.json"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config == {"model": {"rate": 0.5}, "seed_everything": 3, "ckpt_path": None}
    parts = json.loads((folder / "model.json").read_text())["parts"]
    assert parts["image_projector"]["class_path"] == "callback_fakes.Bridge"


def test_a_saved_config_starts_the_same_run_elsewhere(tmp_path: Path) -> None:
    cli("fit", tmp_path / "a", "--model.rate=0.5")
    text = (tmp_path / "a" / "config.yaml").read_text()
    assert yaml.safe_load(text)["model"] == {"rate": 0.5}
    (tmp_path / "again.yaml").write_text(text.replace(str(tmp_path / "a"), str(tmp_path / "b")))
    cli("fit", tmp_path / "b", "--config", str(tmp_path / "again.yaml"))
    assert (tmp_path / "b" / "config.yaml").read_text() == (tmp_path / "again.yaml").read_text()


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_only_fit_writes_and_refuses(tmp_path: Path, command: str) -> None:
    cli(command, tmp_path)
    assert files(tmp_path) == []
    (tmp_path / "config.yaml").write_text("model: {}\n")
    cli(command, tmp_path, "--model.rate=0.5")
    assert (tmp_path / "config.yaml").read_text() == "model: {}\n" and files(tmp_path) == ["config.yaml"]


def test_a_second_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    fit(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"already holds a run \(config.yaml, 2 checkpoints in checkpoints/\)") as error:
        fit(tmp_path, {"model.rate": 0.5})
    for way_out in ("--trainer.default_root_dir", "--ckpt_path last", "delete the folder"):
        assert way_out in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_checkpoints_alone_are_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"hours of work")
    with pytest.raises(ValueError, match=r"already holds a run \(1 checkpoint in checkpoints/\)"):
        fit(tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def test_where_no_checkpoint_is_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"already holds a run \(config.yaml\)") as error:
        fit(tmp_path)
    assert "--ckpt_path" not in str(error.value)


def test_checkpoints_are_kept_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is written, and also where it is a link to another disk."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    monkeypatch.chdir(tmp_path)
    for given in (None, "run/checkpoints", run / "checkpoints/", run / "../run/checkpoints"):
        assert checkpoint_folder(run, given) == run / "checkpoints"
    for elsewhere in (disk, run, run / "checkpoints/deeper", "checkpoints", "s3://bucket/run/checkpoints"):
        with pytest.raises(ValueError, match=rf"checkpoint\.dirpath is {elsewhere}, but a run keeps .* in {run}/checkpoints"):
            checkpoint_folder(run, elsewhere)
    for folder in (run, disk):
        folder.mkdir()
    (run / "checkpoints").symlink_to(disk)
    assert checkpoint_folder(run, disk) == run / "checkpoints"


def test_a_resumed_run_keeps_every_config(tmp_path: Path) -> None:
    fit(tmp_path)
    first = (tmp_path / "config.yaml").read_text()
    last = {"ckpt_path": str(tmp_path / "checkpoints" / "last.ckpt")}
    steps = [(1e-5, []), (0.5, ["config-2.yaml"]), (0.5, ["config-2.yaml"]), (0.7, ["config-2.yaml", "config-3.yaml"])]
    for epochs, (rate, expected) in enumerate(steps, start=2):
        fit(tmp_path, last | {"model.rate": rate}, epochs=epochs)
        assert [name for name in files(tmp_path) if name.startswith("config-")] == expected
    rates = [yaml.safe_load((tmp_path / f"config-{number}.yaml").read_text())["model"]["rate"] for number in (2, 3)]
    assert rates == [0.5, 0.7]
    assert (tmp_path / "config.yaml").read_text() == first


def test_last_that_finds_nothing_beside_checkpoints_is_no_silent_restart(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-9.ckpt").write_bytes(b"hours of work")
    with pytest.raises(ValueError, match=r"--ckpt_path last found no checkpoint to resume from, but .* holds 1 checkpoint"):
        fit(tmp_path, {"ckpt_path": "last"})
    assert not (tmp_path / "config.yaml").exists()


class HeldUp(FakeModule):
    """Tells at its first batch that it trains, and waits for a word."""

    def __init__(self, told: int, word: int) -> None:
        super().__init__()
        self.told, self.word = told, word

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        os.write(self.told, b"x")
        os.read(self.word, 1)
        return super().training_step(batch, batch_idx)


def test_two_runs_at_once_are_one_too_many(tmp_path: Path) -> None:
    fit(tmp_path)
    last = {"ckpt_path": str(tmp_path / "checkpoints/last.ckpt")}
    begun, word = os.pipe(), os.pipe()
    other = fork(lambda: fit(tmp_path, last, HeldUp(begun[1], word[0]), epochs=2))
    os.read(begun[0], 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=rf"in use: process {other} on .*, since .*, has it.*--trainer\.default_root_dir"):
        fit(tmp_path, last, epochs=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    os.write(word[1], b"xx")
    assert os.waitpid(other, 0)[1] == 0
    fit(tmp_path, last, epochs=2)


class Begins(Callback):
    """Another process begins a run, and ends it, while this one makes its weights."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        (Path(trainer.default_root_dir) / "config.yaml").write_text("of: another\n")


def test_a_run_that_came_before_is_not_written_over(tmp_path: Path) -> None:
    parser = LightningArgumentParser()
    trainer = make_trainer(tmp_path, [Begins(), RunFolder(parser, parser.parse_object({}))])
    with pytest.raises(ValueError, match=r"already holds a run \(config.yaml\)"):
        trainer.fit(FakeModule(), datamodule=CliData())
    assert (tmp_path / "config.yaml").read_text() == "of: another\n"


def test_a_run_without_a_single_step_leaves_the_folder_free(tmp_path: Path) -> None:
    for fail_at, kept in [(0, False), (1, True)]:
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(tmp_path, module=Fails(fail_at))
        assert (tmp_path / "config.yaml").exists() == kept


def test_overwrite(tmp_path: Path) -> None:
    fit(tmp_path)
    fit(tmp_path, {"model.rate": 0.25}, overwrite=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["rate"] == 0.25


def test_multifile_keeps_the_files_apart(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("rate: 0.25\n")
    parser = LightningArgumentParser()
    parser.add_class_arguments(CliModule, "model")
    config = parser.parse_args([f"--model={tmp_path / 'model.yaml'}"])
    folder = tmp_path / "run"
    trainer = make_trainer(folder, [RunFolder(parser, config, multifile=True)])
    trainer.fit(FakeModule(), datamodule=CliData())
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"model": "model.yaml"}
    assert yaml.safe_load((folder / "model.yaml").read_text()) == {"rate": 0.25}


class LockedConfig(dict[str, Any]):
    calls = 0

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
        assert allow_val_change
        self.calls += 1
        super().update(values)


class FakeRun:
    """As much of a W&B run as is used."""

    def __init__(self, sweep_id: str | None, config: dict[str, Any]) -> None:
        self.sweep_id, self.config, self.name, self.id = sweep_id, LockedConfig(config), "run", "run"

    def log(self, metrics: dict[str, Any]) -> None:
        pass


class FakeLogger(WandbLogger):
    """Without the second that importing wandb costs."""

    def __init__(self, run: FakeRun) -> None:
        super().__init__()
        self.run = run

    @property
    def experiment(self) -> Any:
        return self.run


@pytest.mark.parametrize("sweep_id", [None, "abc"])
def test_wandb_gets_the_nested_config_once(tmp_path: Path, sweep_id: str | None) -> None:
    run = FakeRun(sweep_id, {} if sweep_id is None else {"model.rate": 0.5, "seed_everything": 99})
    fit(tmp_path, {"model.rate": 1e-5}, logger=FakeLogger(run))
    assert run.config.calls == 1
    assert run.config["model"] == {"rate": 1e-5}  # a number, which YAML would have read back as a text
    assert run.config["seed_everything"] == (3 if sweep_id is None else 99)  # the agent's own keys are locked
    assert "config.yaml" in files(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot be written \(.*--trainer.default_root_dir"):
        fit(tmp_path / "file" / "run")


def test_the_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ValueError, match=rf"/{LOCK} cannot be written \(Is a directory\)"):
        fit(tmp_path)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "é old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightning_modules.run_folder.os", SimpleNamespace(fsync=full))
    with pytest.raises(ValueError, match=r"summary.json cannot be written \(No space left on device\): make room"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "é old"
