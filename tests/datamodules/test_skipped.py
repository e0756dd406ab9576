import errno
import io
import json
import logging
import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from datamodules.batch import Origin, RowError
from datamodules.skipped import SkippedRows


def error(line: int, reason: str = "no picture", file: str = "rows.jsonl", source: str = "") -> RowError:
    return RowError(Origin(file, line, source), reason)


def make(path: Path | None, max_skipped: float = 0.5, num_rows: int = 100) -> SkippedRows:
    return SkippedRows(path, "rows.jsonl", num_rows, max_skipped)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lines(path: Path) -> list[int]:
    return [row["line"] for row in read(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "skipped.jsonl"


def test_rows_are_named_with_file_line_and_reason(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped = make(path)
    with caplog.at_level(logging.WARNING):
        skipped.add([error(4, "größer als ,max'\n"), error(2)])
        skipped.add([])
        skipped.add([error(8, 'the half \ud800 of "one"')])
    assert read(path) == [
        {"file": "rows.jsonl", "line": 4, "reason": "größer als ,max'\n"},
        {"file": "rows.jsonl", "line": 2, "reason": "no picture"},
        {"file": "rows.jsonl", "line": 8, "reason": 'the half \ud800 of "one"'},
    ]
    assert "größer" in path.read_text(encoding="utf-8")
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped 2 row(s), 2 so far, see {path}; the last: rows.jsonl:2: no picture",
        f'skipped 1 row(s), 3 so far, see {path}; the last: rows.jsonl:8: the half \ud800 of "one"',
    ]


def test_a_row_is_named_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped = make(path)
    for _ in range(3):
        skipped.add([error(4), error(2)])
    skipped.add([error(2), error(9)])
    make(path).add([error(9), error(2), error(11)])
    assert lines(path) == [4, 2, 9, 11]
    assert len(caplog.records) == 3


def test_the_same_line_of_another_file_is_another_row(path: Path) -> None:
    make(path).add([error(4)])
    SkippedRows(path, "val.jsonl", 10, 1.0).add([error(4, file="val.jsonl")])
    assert [(row["file"], row["line"]) for row in read(path)] == [("rows.jsonl", 4), ("val.jsonl", 4)]


def test_too_many_stop_the_run(path: Path) -> None:
    skipped = make(path, max_skipped=0.29)
    skipped.add([error(line) for line in range(1, 30)])
    with pytest.raises(ValueError) as caught:
        skipped.add([error(40, "not JSON")])
    assert str(caught.value) == (
        "30 of 100 rows (30 %) from rows.jsonl could not be used, and data.max_skipped = 0.29 allows 29. The last one is "
        f"rows.jsonl:40: not JSON. Mend these rows, see {path}, or raise data.max_skipped"
    )
    assert len(lines(path)) == 30


@pytest.mark.parametrize("num_rows", [7, 100, 300])
@pytest.mark.parametrize("percent", [1, 7, 29, 57])
def test_exactly_the_share_is_allowed(num_rows: int, percent: int) -> None:
    allowed = max(1, percent * num_rows // 100)
    skipped = make(None, percent / 100, num_rows)
    skipped.add([error(line + 1) for line in range(allowed)])
    with pytest.raises(ValueError, match=rf"^{allowed + 1} of {num_rows} rows .* allows {allowed}\."):
        skipped.add([error(num_rows)])


def test_one_bad_row_passes_in_a_small_file_unless_none_may() -> None:
    skipped = make(None, 0.01, num_rows=10)
    skipped.add([error(4)])
    with pytest.raises(ValueError, match=r"^2 of 10 rows \(20 %\) from rows.jsonl could not .* = 0.01 allows 1\."):
        skipped.add([error(7)])
    with pytest.raises(ValueError, match=r"^1 of 300 rows \(0.333 %\) .* = 0.0 allows 0\."):
        make(None, 0.0, num_rows=300).add([error(4)])
    with pytest.raises(ValueError, match=r"^1 of 1 rows \(100 %\) .*, so none is left\."):
        make(None, 0.01, num_rows=1).add([error(1)])


def test_a_file_of_bad_rows_is_never_allowed() -> None:
    skipped = make(None, max_skipped=1.0, num_rows=3)
    skipped.add([error(1), error(3)])
    with pytest.raises(ValueError, match=r"^3 of 3 rows \(100 %\) from rows.jsonl could not be used, so none is left"):
        skipped.add([error(2)])


def test_a_row_that_was_mended_before_a_resume_does_not_count(path: Path) -> None:
    with pytest.raises(ValueError, match="^51 of 100 rows"):
        make(path).add([error(line) for line in range(1, 52)])
    resumed = make(path)
    resumed.add([error(3), error(60)])
    assert resumed.count == 2 and lines(path)[-1] == 60 and len(lines(path)) == 52


def test_rows_of_other_processes_count(path: Path) -> None:
    first, second = make(path, max_skipped=0.04), make(path, max_skipped=0.04)
    first.add([error(1), error(2)])
    SkippedRows(path, "val.jsonl", 100, 1.0).add([error(77, file="val.jsonl")])
    second.add([error(3), error(2)])
    first.add([error(4)])
    assert (first.count, second.count) == (4, 3)
    with pytest.raises(ValueError, match="^5 of 100 rows"):
        second.add([error(5)])
    assert [row["line"] for row in read(path) if row["file"] == "rows.jsonl"] == [1, 2, 3, 4, 5]


def test_rows_of_another_split_of_the_file_do_not_count(path: Path) -> None:
    train = SkippedRows(path, "rows.jsonl", 50, 0.04, lambda line: line % 2 == 1)
    val = SkippedRows(path, "rows.jsonl", 50, 0.04, lambda line: line % 2 == 0)
    train.add([error(1)])
    val.add([error(2), error(4)])
    train.add([error(3)])
    assert (train.count, val.count) == (2, 2)
    with pytest.raises(ValueError, match="^3 of 50 rows"):
        val.add([error(6)])
    assert lines(path) == [1, 2, 4, 3, 6]


def _add_some(path: Path, rank: int, barrier: Barrier) -> None:
    skipped = SkippedRows(path, "rows.jsonl", 1000, 1.0)
    barrier.wait()
    for line in range(rank, 60):
        skipped.add([error(line, f"{rank} {'x' * 500}"), error(1000 + 100 * rank + line)])


def test_processes_at_work_at_once_name_each_row_once(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_add_some, args=(path, rank, barrier)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    expected = [*range(60), *(1000 + 100 * rank + line for rank in range(4) for line in range(rank, 60))]
    assert sorted(lines(path)) == expected
    assert {process.exitcode for process in processes} == {0}


def test_a_line_that_a_killed_process_left_unfinished_is_taken_away(path: Path) -> None:
    make(path).add([error(1)])
    whole = path.read_bytes()
    make(path).add([error(2), error(3)])
    path.write_bytes(path.read_bytes()[:-20])
    resumed = make(path)
    resumed.add([error(3), error(2), error(1)])
    assert lines(path) == [1, 2, 3] and path.read_bytes().startswith(whole)


@pytest.mark.parametrize("content", ["{}\n", "[1, 2]\n", "not JSON\n"])
def test_a_file_with_something_else_in_it_is_refused(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"skipped\.jsonl holds something else than skipped rows .*: delete or rename it"):
        make(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=r"run/skipped\.jsonl cannot be written \(.*\): .*--trainer\.default_root_dir"):
        make(tmp_path / "run" / "skipped.jsonl").add([error(1)])


def test_sources_of_one_file_count_for_themselves(path: Path) -> None:
    """As where a file is read twice, with another prompt template: a row may be bad in one way and good in the other."""
    sources = {name: SkippedRows(path, "rows.jsonl", 100, 0.02, source=name) for name in ("asked", "told")}
    sources["asked"].add([error(4, source="asked"), error(5, source="asked")])
    sources["told"].add([error(4, source="told")])
    assert read(path)[2] == {"source": "told", "file": "rows.jsonl", "line": 4, "reason": "no picture"}
    again = SkippedRows(path, "rows.jsonl", 100, 0.02, source="told")
    again.add([error(4, source="told"), error(9, source="told")])
    assert (sources["asked"].count, sources["told"].count, again.count) == (2, 1, 2) and len(read(path)) == 4
    with pytest.raises(ValueError, match=r"^3 of 100 rows \(3 %\) from rows\.jsonl \(source 'told'\) could not be used"):
        again.add([error(8, source="told")])


def test_a_network_disk_that_is_full_at_the_closing_leaves_no_hole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullAtClosing(io.BufferedRandom):
        def close(self) -> None:
            if not self.closed:
                self.truncate(size)  # what was flushed has not come to the disk
                super().close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    skipped = make(path)
    skipped.add([error(4)])
    size = path.stat().st_size
    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda self, mode: FullAtClosing(io.FileIO(self, mode.replace("b", ""))))
        skipped.add([error(2)])
    skipped.add([error(7), error(2)])
    assert lines(path) == [4, 7, 2]


def test_on_a_full_disk_the_log_names_the_row_and_the_file_does_when_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data)[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    skipped, other = make(path, max_skipped=0.04), make(path)
    skipped.add([error(4)])
    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda self, mode: Full(self, mode.replace("b", "")))
        skipped.add([error(2), error(4), error(7, "no answer")])
    assert skipped.count == 3 and path.read_bytes().endswith(b'{"file": "rows.jsonl')
    told = [record.getMessage() for record in caplog.records][1:]
    assert told == [f"{path} (No space left on device) cannot name rows.jsonl:{row}" for row in ("2: no picture", "7: no answer")]
    other.add([error(9)])
    skipped.add([error(7, "no answer")])
    assert lines(path) == [4, 9, 7] and skipped.count == 4
