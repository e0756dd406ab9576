"""A disk that is full or fails at any point of a save: the checkpoint from before stays, and it is said what happened."""

import errno
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.callbacks import PartTable, RunSummary, SamplePage
from lightning_modules.checkpoints import CannotSaveError, CheckpointFile, RunCheckpoint
from lightning_modules.cli import find_checkpoint
from lightning_modules.run_folder import cannot_write
from models.manifest import newest, read_manifest, sweep
from tests.faults.full_disk import FullAt
from tests.faults.small_runs import end_state, fit, make_module, same
from tests.lightning_modules.run_fakes import write_rows


class Disk:
    """What a save asks of the disk, in order, of which something fails.

    Args:
        fails: The number of the call that fails; None: none does.
        code: With which error; 0: it writes less than it was asked to.
        stays: All calls after it fail too.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int | None = None, code: int = 0, stays: bool = False) -> None:
        self.fails, self.code, self.stays = fails, code, stays
        self.calls: list[str] = []
        fsync, replace = os.fsync, os.replace

        def dump_half(value: Any, file: Any, **options: Any) -> None:
            text = json.dumps(value, **options)
            file.write(text[: len(text) // 2])
            self.call("manifest", lambda: None)
            file.write(text[len(text) // 2 :])

        monkeypatch.setattr("os.fsync", lambda *arguments: self.call("fsync", lambda: fsync(*arguments)))
        monkeypatch.setattr("os.replace", lambda *arguments: self.call("rename", lambda: replace(*arguments)))
        monkeypatch.setattr("json.dump", dump_half)

    def is_due(self) -> bool:
        """Whether the call at hand fails."""
        number = len(self.calls) - 1
        return self.fails is not None and (number == self.fails or (self.stays and number > self.fails))

    def call(self, name: str, act: Callable[[], Any]) -> Any:
        self.calls.append(name)
        if self.is_due() and self.code:
            raise OSError(self.code, os.strerror(self.code))
        return act()


class Files(CheckpointFile):
    """Checkpoints on such a disk."""

    disk: Disk

    def open(self, path: Path) -> io.RawIOBase:
        return _File(path, self.disk)


class _File(io.FileIO):
    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, "w")
        self.disk = disk

    def write(self, data: Any) -> int:
        whole = super().write
        self.disk.calls.append("write")
        if not self.disk.is_due():
            return whole(data)
        written = whole(data[: max(1, len(data) // 2)])
        if self.disk.code:
            raise OSError(self.disk.code, os.strerror(self.disk.code))
        return written


def save(folder: Path, disk: Disk, step: int) -> None:
    files = Files()
    files.disk = disk
    content = {"global_step": step, "a": torch.full((9_000,), float(step)), "state_dict": {}, "model": {}, "fingerprints": {}}
    files.save_checkpoint(content, folder / "last.ckpt")


FAULTS = [(errno.ENOSPC, True), (errno.ENOSPC, False), (errno.EIO, True), (errno.EIO, False)]


@pytest.mark.parametrize(("code", "stays"), FAULTS)
def test_a_fault_anywhere_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, stays: bool
) -> None:
    well = Disk(monkeypatch)
    save(tmp_path / "well", well, 1)
    assert well.calls[-6:] == ["fsync", "manifest", "fsync", "rename", "rename", "fsync"] and well.calls.count("write") == 3
    monkeypatch.undo()
    for number in range(len(well.calls)):
        folder = tmp_path / f"{number}"
        save(folder, Disk(monkeypatch), 1)
        monkeypatch.undo()
        disk = Disk(monkeypatch, number, code, stays)
        with pytest.raises(CannotSaveError, match=rf"last\.ckpt cannot be written \({re.escape(os.strerror(code))}\): make room"):
            save(folder, disk, 2)
        monkeypatch.undo()
        is_renamed = "rename" in well.calls[:number]  # then the new one is whole, and its manifest may have its temporary name
        found = newest([folder])
        assert found is not None and not found.left
        content = CheckpointFile().load_checkpoint(found.path)
        assert content["global_step"] == found.manifest.step == (2 if is_renamed else 1), well.calls[number]
        assert torch.equal(content["a"], torch.full((9_000,), float(content["global_step"])))
        assert is_renamed or sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "last.ckpt.manifest.json"]
        sweep(folder)
        assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "last.ckpt.manifest.json"]
        assert read_manifest(folder / "last.ckpt") == found.manifest


def test_a_disk_that_takes_less_than_it_is_given_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, 0, stays=True)
    save(tmp_path, disk, 3)
    assert disk.calls.count("write") > 20
    found = newest([tmp_path])
    assert found is not None and found.manifest.step == 3
    assert torch.equal(CheckpointFile().load_checkpoint(found.path)["a"], torch.full((9_000,), 3.0))


Run = Callable[..., Any]


@pytest.fixture
def run(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> Run:
    """`run(name, on_save_error, *steps)`: fits, and saves after each step; the disk is full after some."""
    rows = write_rows(tmp_path / "rows.jsonl", 9)

    def run(name: str, on_save_error: Any, *steps: int, **options: Any) -> Any:
        checkpoint = RunCheckpoint(every_n_train_steps=1, on_save_error=on_save_error)
        files = FullAt()
        files.steps = frozenset(steps)
        module, accounts = make_module(tiny_llm, tiny_clip), (PartTable(), SamplePage(1), RunSummary())
        return fit(module, tmp_path / name, rows, *accounts, checkpoint=checkpoint, files=files, **options)

    return run


def test_the_run_stops_and_goes_on_when_there_is_room(run: Run, tmp_path: Path) -> None:
    run("whole", "stop")
    with pytest.raises(CannotSaveError, match="No space left on device.*make room"), pytest.warns(UserWarning, match="No space"):
        run("stopped", "stop", 2, 3)
    found = find_checkpoint("last", tmp_path / "stopped")
    assert found is not None and CheckpointFile().load_checkpoint(found)["global_step"] == 1
    run("stopped", "stop", resume=found)
    assert same(end_state(tmp_path / "stopped"), end_state(tmp_path / "whole"))


def test_the_run_goes_on_without_a_checkpoint(run: Run, tmp_path: Path) -> None:
    run("whole", "go_on")
    with pytest.warns(UserWarning, match=r"No space left.*The run goes on without a checkpoint of step \d"):
        run("full", "go_on", 2, 3)
    assert same(end_state(tmp_path / "full"), end_state(tmp_path / "whole"))
    names = [sorted(file.name for file in (tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "full")]
    assert names[0] == names[1]
    with pytest.warns(UserWarning, match="No space left"):
        run("to_the_end", "go_on", 2, 3, 4, 5, 6)
    found = find_checkpoint("last", tmp_path / "to_the_end")
    assert found is not None and CheckpointFile().load_checkpoint(found)["global_step"] == 1
    summary = json.loads((tmp_path / "to_the_end/summary.json").read_text())
    assert Path(summary["last_checkpoint"]).name == "last.ckpt"
    run("to_the_end", "stop", resume=found)
    assert same(end_state(tmp_path / "to_the_end"), end_state(tmp_path / "whole"))


def test_it_goes_on_without_accounts_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"data": {"val_path": str(tmp_path / "rows.jsonl")}, "max_epochs": 1}
    run("whole", "stop", **options)

    def refuse(path: Path, text: str) -> None:
        raise ValueError(cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))

    monkeypatch.setattr("lightning_modules.checkpoints.write_text", refuse)
    with pytest.warns(UserWarning) as warned:
        run("full", "go_on", 1, 2, 3, **options)
    for name in ("parts.json", "samples.json", "samples.html", "summary.json"):
        told = (
            rf"full/{name} cannot be written \(No space left on device\).*goes on without it, since checkpoint\.on_save_error is"
        )
        assert any(re.search(told, str(warning.message)) for warning in warned)
        assert (tmp_path / "whole" / name).exists() and not (tmp_path / "full" / name).exists()
    with pytest.raises(ValueError, match=r"parts\.json cannot be written"):
        run("stopped", "stop")
