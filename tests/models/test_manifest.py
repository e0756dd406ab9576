"""A checkpoint is what its manifest says, whatever moment the process that wrote it was killed in."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from models.manifest import (
    Manifest,
    discard,
    fault,
    file_sums,
    manifest_path,
    newest,
    publish,
    read_manifest,
    sweep,
    temporary_name,
)

Write = Callable[[Path, str], None]


def write_file(path: Path, content: str) -> None:
    path.write_text(content)


def write_shards(path: Path, content: str) -> None:
    (path / "deep").mkdir(parents=True)
    (path / "meta").write_text(content)
    (path / "deep/shard").write_text(2 * content)


def content(path: Path) -> str:
    return (path / "meta" if path.is_dir() else path).read_text()


def save(path: Path, text: str, write: Write, step: int = 1) -> None:
    temporary = temporary_name(path)
    write(temporary, text)
    publish(temporary, path, Manifest(step, file_sums(temporary, path.name), "run-1"))


@pytest.mark.parametrize("write", [write_file, write_shards])
def test_files_and_folders_are_told_of(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "last.ckpt"
    save(path, "one", write, step=4)
    manifest = read_manifest(path)
    assert manifest is not None and (manifest.step, manifest.wandb_run_id) == (4, "run-1")
    assert sum(size for size, _ in manifest.files.values()) == (9 if path.is_dir() else 3)
    save(path, "two", write, step=5)
    assert fault(path) == "" and content(path) == "two"
    found = newest([tmp_path])
    assert found is not None and (found.path, found.manifest.step, found.left) == (path, 5, [])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.manifest.json"]


@pytest.mark.parametrize("write", [write_file, write_shards])
@pytest.mark.parametrize("calls", range(20))
def test_a_kill_at_any_moment_leaves_one_that_is_whole(tmp_path: Path, write: Write, calls: int) -> None:
    """Each change that `publish` makes to the folder is a moment."""
    path = tmp_path / "last.ckpt"
    save(path, "one", write, step=1)
    if (child := os.fork()) == 0:
        os._exit(dies_after(calls, lambda: save(path, "two", write, step=2)))
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = newest([tmp_path])
    assert found is not None and found.left == [] and content(found.path) == {1: "one", 2: "two"}[found.manifest.step]
    sweep(tmp_path)
    assert fault(path) == "" and content(path) == content(found.path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.manifest.json"]
    assert content(path) == "two" or ended == 9
    save(path, "three", write, step=3)
    assert content(path) == "three" and fault(path) == ""


def test_a_manifest_that_was_never_renamed_makes_nothing_newer(tmp_path: Path) -> None:
    """A kill came before last.ckpt of step 3 got its name, its manifest being there; the newest is that of step 2."""
    last, aside = tmp_path / "last.ckpt", tmp_path / "aside"
    save(last, "one", write_file, step=1)
    save(tmp_path / "best.ckpt", "two", write_file, step=2)
    aside.mkdir()
    save(aside / "last.ckpt", "three", write_file, step=3)
    manifest_path(aside / "last.ckpt").rename(temporary_name(manifest_path(last)))
    found = newest([tmp_path])
    assert found is not None and (found.path.name, found.manifest.step, found.left) == ("best.ckpt", 2, [])


def dies_after(calls: int, act: Callable[[], None]) -> int:
    """Runs a function in this process and ends it as by a kill before its next call that opens, renames or removes something."""
    left = [calls]

    def count(event: str, _: object) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1

    sys.addaudithook(count)
    act()
    return 0


def test_what_was_changed_is_named(tmp_path: Path) -> None:
    file, folder = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    save(file, "one", write_file)
    save(folder, "one", write_shards)
    file.write_text("onE")
    (folder / "deep/shard").write_text("one")
    assert fault(file) == "its SHA-256 differs"
    assert fault(folder) == "b.ckpt/deep/shard has 3 of 6 bytes"
    (folder / "deep/shard").unlink()
    assert fault(folder) == "b.ckpt/deep/shard is missing"
    assert read_manifest(file) is None and read_manifest(folder) is None
    with pytest.raises(ValueError, match=r"no checkpoint is whole \(.*b\.ckpt.* is missing; .*a\.ckpt: its SHA-256 differs\)"):
        newest([tmp_path])


def test_a_manifest_that_is_none_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_text("one")
    for text in ("", "[1, 2]", '{"step": 1}', '{"step": 1, "files": {"a.ckpt": 3}, "wandb_run_id": null, "written_ns": 1}'):
        manifest_path(path).write_text(text)
        assert fault(path) == "" and read_manifest(path) is None and newest([tmp_path]) is None


def test_the_sweep_takes_only_what_is_ours(tmp_path: Path) -> None:
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    others = [".hidden", ".editor.swp", "notes.tmp", ".config.yaml.tmp", last.name, ".last.ckpt.bak"]
    ours = [temporary_name(last), temporary_name(last), temporary_name(manifest_path(last)), tmp_path / "gone.ckpt.manifest.json"]
    assert len({temporary_name(last).name for _ in range(99)}) == 99, "no two runs write the same file"
    for path in (*map(tmp_path.joinpath, others), *ours):
        path.write_text("x")
    (folder := temporary_name(best)).mkdir()
    (folder / "shard").write_text("x")
    sweep(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(others)


def test_what_an_older_version_left_is_understood_and_swept(tmp_path: Path) -> None:
    """Killed between its two renames, and in a later save; its temporary names were the same each time."""
    path, aside = tmp_path / "last.ckpt", tmp_path / "aside"
    save(path, "one", write_file, step=1)
    aside.mkdir()
    save(aside / "last.ckpt", "two", write_file, step=2)
    (aside / "last.ckpt").rename(path)
    manifest_path(aside / "last.ckpt").rename(tmp_path / ".last.ckpt.manifest.json.tmp")
    aside.rmdir()
    (tmp_path / ".best.ckpt.tmp").write_text("thr")
    found = newest([tmp_path])
    assert found is not None and (found.path, found.manifest.step, found.left) == (path, 2, [])
    sweep(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.manifest.json"]
    assert (manifest := read_manifest(path)) is not None and manifest.step == 2


@pytest.mark.parametrize("before", [write_file, write_shards])
def test_a_save_goes_on_where_another_command_looks_for_the_newest_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Write
) -> None:
    path, replace, looks = tmp_path / "last.ckpt", Path.replace, list[Path]()

    def look_behind(file: Path, target: Path) -> None:
        replace(file, target)
        if target.suffix == ".old" and not looks:
            looks.append(target)
            found = newest([tmp_path])
            assert found is not None and found.manifest.step == 1

    save(path, "one", before, step=1)
    monkeypatch.setattr(Path, "replace", look_behind)
    save(path, "two", write_shards, step=2)
    assert looks and content(path) == "two" and fault(path) == ""
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.manifest.json"]


def test_what_could_not_be_finished_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save(path, "one", write_file)
    temporary = temporary_name(path)
    temporary.write_text("tw")
    discard(temporary)
    discard(temporary)
    assert fault(path) == "" and len(list(tmp_path.iterdir())) == 2


def test_the_newest_is_the_one_that_was_written_last_by_any_clock(tmp_path: Path) -> None:
    """A job that was put back into the queue goes on where the clock is an hour behind."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save(folder / "first.ckpt", "one", write_file, step=1)
    places = (folder / "last.ckpt", folder / "best.ckpt", tmp_path / "hpc_ckpt_1.ckpt", folder / "last.ckpt")
    for step, path in enumerate(places, start=2):
        temporary = temporary_name(path)
        write_file(temporary, str(step))
        sums = file_sums(temporary, path.name)
        publish(temporary, path, Manifest(step, sums, written_ns=time.time_ns() - 3_600 * 10**9))
        found = newest([folder, tmp_path])
        assert found is not None and (found.path, found.manifest.step) == (path, step)


def test_a_folder_takes_the_place_of_a_file_and_the_other_way_round(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step, write in enumerate((write_file, write_shards, write_file)):
        save(path, str(step), write, step=step)
        assert content(path) == str(step) and read_manifest(path) is not None
        assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.manifest.json"]
