"""JSON lines, one object a line, read at random: a memory-mapped file with an index of its rows."""

import json
import mmap
import operator
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from datamodules.batch import Origin, RowError
from datamodules.jsonl_index import BOM, Stamp, open_index

_HEAD_BYTES = 1 << 16
_OTHER_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16 or UTF-32 text",
    b"\xfe\xff": "UTF-16 text",
}


class JsonlFile:
    """The rows of a JSON-lines file, by number.

    Rows are found through an index of 8 bytes a row, mapped from `<name>.idx` beside the file, or from the cache
    folder ($XDG_CACHE_HOME or ~/.cache) where that cannot be written. It is built when first needed and whenever the
    file has changed. A byte-order mark and CRLF are read as meant; blank lines are no rows, but count as lines.
    Safe to fork, and to pickle: the copy maps the file anew.

    Args:
        path: The file: UTF-8, one JSON object a line.
        source: The name of its rows in a mixture.

    Raises:
        ValueError: The file is missing, empty, a folder or not JSON lines, or its index can be written nowhere.
    """

    def __init__(self, path: str | Path, source: str = "") -> None:
        self.path = Path(path)
        self.source = source
        self._data, self._stamp = _map_file(self.path)
        _refuse_other_formats(self.path, self._data[:_HEAD_BYTES])
        self._index = open_index(self.path, self._data, self._stamp)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "source": self.source, "stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["source"])  # type: ignore[misc]
        if self._stamp != state["stamp"]:
            raise ValueError(f"{self.path} was changed while it was in use: leave data files alone during a run, and start again")

    def __len__(self) -> int:
        return len(self._index.starts_S) - 1

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i, counted from 0.

        Raises:
            IndexError: There is no such row.
            RowError: The row is not one well-formed JSON object.
        """
        line, line_end = self._line(i)
        try:
            return _decode(line.rstrip())
        except ValueError as error:
            is_cut = i == len(self) - 1 and not line_end and line.count(b"{") > line.count(b"}")
            hint = ". The file ends in the middle of this line: it seems cut, copy or write it again" if is_cut else ""
            raise RowError(self.origin(i), f"{error}{hint}") from error

    @property
    def sha256(self) -> str:
        """Of the whole file, found when it was indexed."""
        return self._index.sha256

    def line(self, i: int) -> bytes:
        """The bytes of row i as they stand in the file, without the line feed that ends them.

        Raises:
            IndexError: There is no such row.
        """
        return self._line(i)[0]

    def _line(self, i: int) -> tuple[bytes, bytes]:
        i = self._check(i)
        start, end = (int(offset) for offset in self._index.starts_S[i : i + 2])
        line, line_end, _ = self._data[start:end].partition(b"\n")
        return line, line_end

    def origin(self, i: int) -> Origin:
        """File and line of row i; the line is counted from 1 and counts blank lines too.

        Raises:
            IndexError: There is no such row.
        """
        i = self._check(i)
        return Origin(str(self.path), i + 1 + self._index.num_blanks_before(i), self.source)

    def _check(self, i: int) -> int:
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path} has rows 0 to {len(self) - 1}, got {i}")
        return i


def _map_file(path: Path) -> tuple[mmap.mmap, Stamp]:
    expected = "expected a JSON-lines file (one JSON object a line)"
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a folder, {expected}: name one file in it")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is no regular file, {expected}: write its content to a file first")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise ValueError(f"{path} is empty, {expected}: check what was to write it")
            data = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(
            f"{path.absolute()} cannot be read ({error.strerror}), {expected}: check path and permissions"
        ) from error
    return data, Stamp(status.st_size, status.st_mtime_ns % 2**64)


def _refuse_other_formats(path: Path, head: bytes) -> None:
    """Refuses a file whose first lines show that it is something else; a bad row among others is not refused here."""
    for magic, name in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {name}, expected JSON lines in UTF-8: unpack or convert it first")
    lines = [line.strip() for line in head.removeprefix(BOM).split(b"\n")]
    first = next((line for line in lines if line), b"")
    if not first:
        raise ValueError(
            f"{path} begins with nothing but blank lines, expected one JSON object a line: check what was to write it"
        )
    new = path.with_suffix(".lines.jsonl").name
    if first.startswith(b"["):
        raise ValueError(
            f"{path} is a JSON list, expected JSON lines (one object a line, no brackets or commas around them): "
            f"convert it, for example with  jq -c '.[]' {path.name} > {new}"
        )
    if first == b"{":
        raise ValueError(
            f"{path} has an object spread over several lines, expected one object a line: "
            f"convert it, for example with  jq -c . {path.name} > {new}"
        )
    if not any(line.startswith(b"{") for line in lines):
        raise ValueError(
            f"{path} is not JSON lines: none of its first lines is a JSON object, the first is {first[:60]!r}. "
            "Write one object a line, such as "
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}'
        )


def _decode(line: bytes) -> dict[str, Any]:
    """One line to its object; a ValueError says what is wrong with it."""
    if b"\0" in line:
        raise ValueError(f"NUL byte at byte {line.index(0)} of the line: the file is damaged, or not UTF-8")
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start} of the line ({error.reason})"
        ) from error
    try:
        row = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("objects or lists nested too deeply: a row has a few levels") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object ({{...}}), got {text[:60]}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                r"half of a surrogate pair (\ud800 to \udfff alone) is no character: it was cut when written"
            ) from error
    return row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        raise ValueError(f"duplicate key {', '.join(map(repr, twice))}: only one of its values could be meant")
    return unique


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value: write a number or null")
