import json
import multiprocessing
import os
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest

from datamodules import jsonl_index
from datamodules.batch import Origin, RowError
from datamodules.jsonl import JsonlFile

FORK = multiprocessing.get_context("fork")
GOOD = b'{"a": 1}'


def random_rows(num_rows: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    alphabet = 'abc "\\{}[]\n\tüß漢字🚌\u2028\x85'
    return [
        {"id": number, "text": "".join(rng.choices(alphabet, k=rng.randint(0, 60))), "nested": {"x": [rng.random()]}}
        for number in range(num_rows)
    ]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"], ids=["plain", "bom", "blank after bom"])
@pytest.mark.parametrize("block_bytes", [5, 64, 1 << 20])
def test_rows_and_lines_are_those_of_the_file(tmp_path, monkeypatch, ending, head, block_bytes):
    monkeypatch.setattr(jsonl_index, "_BLOCK_BYTES", block_bytes)
    rng = random.Random(block_bytes)
    rows = random_rows(40, seed=block_bytes)
    content, line_numbers, line = head, [], 1 + head.count(b"\n")
    for row in rows:
        for blank in rng.choices([b"", b" \t", b"\xef\xbb\xbf"], k=rng.choice([0, 0, 0, 1, 3])):
            content += blank + ending
            line += 1
        line_numbers.append(line)
        content += rng.choice([b"", b"  "]) + json.dumps(row, ensure_ascii=False).encode() + ending
        line += 1
    content = content if rng.random() < 0.5 else content.removesuffix(ending)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)

    file = JsonlFile(path)

    assert len(file) == len(rows)
    order = rng.sample(range(len(rows)), len(rows))
    assert [file[i] for i in order] == [rows[i] for i in order]
    assert [file.origin(i) for i in range(len(rows))] == [Origin(str(path), number) for number in line_numbers]
    assert list(file) == rows  # iteration ends at an IndexError
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"got {outside}"):
            file[outside]


TORTURE = {
    "bad json": (b"{'a': 1}", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    "bad json after wide characters": ('{"ü漢": 1, "b" 2}'.encode(), "at column 15"),
    "trailing comma": (b'{"a": 1,}', "column 9"),
    "two objects": (b'{"a": 1}{"a": 2}', "not JSON: Extra data at column 9"),
    "comma between rows": (b'{"a": 1},', "Extra data at column 9"),
    "control character": (b'{"a": "x\x01"}', "Invalid control character"),
    "nul": (b'{"a": "\x00"}', "NUL byte at byte 7 of the line"),
    "zeroed block": (bytes(4096), "NUL byte at byte 0 of the line"),
    "bad utf-8": (b'{"a": "\xc3\xa4\xff"}', "not UTF-8: byte 0xff at byte 9 of the line"),
    "latin-1": ('{"a": "Bär"}'.encode("latin-1"), "not UTF-8: byte 0xe4 at byte 8 of the line"),
    "half a surrogate pair": (rb'{"a": "\ud83d"}', "surrogate"),
    "a list": (b'[{"a": 1}]', "expected a JSON object"),
    "a number": (b"17", "expected a JSON object ({...}), got 17"),
    "null": (b"null", "expected a JSON object"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 1}', "duplicate key 'a'"),
    "duplicate key inside": (b'{"a": [{"b": {"c": 1, "c": 2}}]}', "duplicate key 'c'"),
    "nan": (b'{"a": NaN}', "NaN is no JSON value"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity is no JSON value"),
    "nested without end": (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    "number without end": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
}


@pytest.mark.parametrize("bad, reason", TORTURE.values(), ids=TORTURE.keys())
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_bad_row_is_named_and_its_neighbours_are_read(tmp_path, bad, reason, ending):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line + ending for line in (GOOD, b"", bad, b'{"b": 2}')))
    file = JsonlFile(path)
    assert (len(file), file[0], file[2]) == (3, {"a": 1}, {"b": 2})
    with pytest.raises(RowError) as caught:
        file[1]
    assert caught.value.origin == Origin(str(path), 3)
    assert reason in caught.value.reason
    assert "seems cut" not in caught.value.reason
    assert str(pickle.loads(pickle.dumps(caught.value))).startswith(f"{path}:3: ")


@pytest.mark.parametrize("row", ['{"a": {"b": "漢字"}, "c": [1, 2]}', '{"a": "x"}'])
def test_every_cut_of_the_last_line_is_called_a_cut(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    whole = row.encode()
    for length in range(1, len(whole)):
        path.write_bytes(GOOD + b"\n" + whole[:length])
        file = JsonlFile(path)
        assert file[0] == {"a": 1}
        with pytest.raises(RowError, match=r"rows.jsonl:2: .*The file ends in the middle of this line: it seems cut"):
            file[1]
    path.write_bytes(GOOD + b"\n" + whole)
    assert JsonlFile(path)[1] == json.loads(row)


OTHER_FILES = {
    "empty": (b"", "is empty"),
    "blank lines": (b"\n \r\n\n", "nothing but blank lines"),
    "a list on one line": (b'[{"a": 1}, {"a": 2}]', "is a JSON list.*jq -c '.\\[\\]' rows.json > rows.lines.jsonl"),
    "a list over several lines": (b'\xef\xbb\xbf[\n  {"a": 1},\n  {"a": 2}\n]\n', "is a JSON list"),
    "an indented object": (b'{\n  "a": 1\n}\n', "spread over several lines.*jq -c \\. rows.json"),
    "csv": (b"image,question\na.jpg,What?\n", "none of its first lines is a JSON object.*image,question"),
    "gzip": (b"\x1f\x8b\x08\n{", "is gzip.*unpack"),
    "parquet": (b"PAR1\n{", "is Parquet.*convert"),
    "utf-16": ('{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
}


@pytest.mark.parametrize("content, reason", OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_a_file_that_is_something_else_is_refused(tmp_path, content, reason):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){path} .*{reason}"):
        JsonlFile(path)
    assert names_in(tmp_path) == ["rows.json"]


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.jsonl cannot be read \(No such file.*expected a JSON-lines file.*check path"):
        JsonlFile(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"is a folder.*name one file in it"):
        JsonlFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        JsonlFile(tmp_path / "pipe")


def test_the_index_is_built_once_and_again_when_the_file_changed(tmp_path):
    rows = random_rows(30, seed=4)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    index = tmp_path / "rows.jsonl.idx"
    assert list(JsonlFile(path)) == rows
    built = index.stat()
    assert list(JsonlFile(path)) == rows
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (built.st_ino, built.st_mtime_ns)

    write_rows(path, rows[:7])
    assert list(JsonlFile(path)) == rows[:7]

    same_size = path.read_bytes().replace(b'\n{"id": 3', b'{\n"id": 3')  # rows move, the size does not
    before = path.stat()
    path.write_bytes(same_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(RowError, match=r"jsonl:3: .*Extra data"):
        JsonlFile(path)[2]
    assert names_in(tmp_path) == ["rows.jsonl", "rows.jsonl.idx"]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-8], lambda b: b[:-3], lambda b: b + bytes(8), lambda b: bytes(len(b))]
)
def test_a_damaged_index_is_built_anew(tmp_path, damage):
    rows = random_rows(5, seed=5)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    JsonlFile(path)
    index = tmp_path / "rows.jsonl.idx"
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    assert list(JsonlFile(path)) == rows
    assert index.read_bytes() == whole


def test_the_index_of_a_million_rows_takes_8_bytes_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((GOOD + b"\n") * 1_000_000)
    assert JsonlFile(path)[999_999] == {"a": 1}
    assert (tmp_path / "rows.jsonl.idx").stat().st_size < 8 * 1_000_000 + 100


def _open_as_nobody(path: Path, cache: Path, answers: Any) -> None:
    os.environ["XDG_CACHE_HOME"] = str(cache)
    if os.geteuid() == 0:
        os.setuid(65534)  # the permissions of a folder do not bind root
    try:
        answers.put(list(JsonlFile(path)))
    except ValueError as error:
        answers.put(str(error))


def test_in_a_read_only_folder_the_index_goes_to_the_cache_folder():
    rows = random_rows(9, seed=6)
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, whose parents only its owner may enter
        data, cache = Path(folder) / "data", Path(folder) / "cache"
        data.mkdir()
        cache.mkdir()
        path = write_rows(data / "rows.jsonl", rows)
        for place, mode in ((Path(folder), 0o755), (data, 0o555), (path, 0o444), (cache, 0o777)):
            place.chmod(mode)

        def ask() -> Any:
            answers = FORK.SimpleQueue()
            process = FORK.Process(target=_open_as_nobody, args=(path, cache, answers))
            process.start()
            process.join()
            assert process.exitcode == 0
            return answers.get()

        assert ask() == rows
        (index,) = (cache / "omnilit" / "jsonl").iterdir()
        built = index.stat().st_mtime_ns
        assert ask() == rows
        assert index.stat().st_mtime_ns == built
        assert names_in(data) == ["rows.jsonl"]

        index.unlink()
        (cache / "omnilit" / "jsonl").chmod(0o555)
        assert "can be written nowhere" in ask() and "XDG_CACHE_HOME" in ask()
        for place in (data, cache / "omnilit" / "jsonl"):
            place.chmod(0o755)


def test_rows_are_read_in_workers_by_pickle_and_by_fork(tmp_path):
    rows = random_rows(50, seed=8)
    file = JsonlFile(write_rows(tmp_path / "rows.jsonl", rows))
    order = random.Random(8).sample(range(50), 50)
    assert len(pickle.dumps(file)) < 1000  # the maps stay behind
    with FORK.Pool(2) as pool:
        assert pool.map(file.__getitem__, order) == [rows[i] for i in order]  # pickles the file with each task

    answers = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: answers.put([file[i] for i in order]))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert answers.get() == [rows[i] for i in order] == [file[i] for i in order]


def test_a_file_changed_between_process_and_worker_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", random_rows(5, seed=9))
    state = pickle.dumps(JsonlFile(path))
    write_rows(path, random_rows(6, seed=9))
    with pytest.raises(ValueError, match="was changed while it was in use"):
        pickle.loads(state)


def test_processes_may_build_the_index_at_once(tmp_path):
    rows = random_rows(300, seed=10)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    barrier, answers = FORK.Barrier(4), FORK.SimpleQueue()

    def build() -> None:
        barrier.wait()
        answers.put(list(JsonlFile(path)) == rows)

    processes = [FORK.Process(target=build) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [answers.get() for _ in processes] == [True] * 4
    assert names_in(tmp_path) == ["rows.jsonl", "rows.jsonl.idx"]
