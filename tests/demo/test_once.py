from pathlib import Path

import pytest

from demo.once import MANIFEST, make_once


def write(text: str):
    def make(folder: Path) -> None:
        (folder / "content.txt").write_text(text)

    return make


def test_made_once_and_again_when_its_origin_changed(tmp_path):
    folder = tmp_path / "below" / "folder"
    assert make_once(folder, {"version": 1}, write("first"))
    assert not make_once(folder, {"version": 1}, write("never"))
    assert (folder / "content.txt").read_text() == "first"
    assert make_once(folder, {"version": 2}, write("second"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(["content.txt", MANIFEST])
    assert (folder / "content.txt").read_text() == "second"


def test_nothing_half_made_is_seen_and_its_remains_do_not_mix_in(tmp_path):
    folder = tmp_path / "folder"

    def dies(partial: Path) -> None:
        (partial / "half.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(folder, {}, dies)
    assert not folder.exists()
    assert make_once(folder, {}, write("whole"))
    assert not (folder / "half.txt").exists()


def test_a_failed_renewal_keeps_the_old_folder(tmp_path):
    folder = tmp_path / "folder"
    make_once(folder, {"version": 1}, write("old"))

    def fails(partial: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        make_once(folder, {"version": 2}, fails)
    assert (folder / "content.txt").read_text() == "old"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds something else"):
        make_once(tmp_path, {}, write("new"))
    assert (tmp_path / "mine.txt").read_text() == "keep"
