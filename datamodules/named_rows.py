"""Rows that are named in a file that all processes of a run share, each once."""

import contextlib
import errno
import fcntl
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from datamodules.batch import FilteredRowError, Origin, RowChange, RowError

log = logging.getLogger(__name__)

Named = TypeVar("Named", RowError, RowChange)


class Line(NamedTuple):
    """A line of the data that was named, and whether reward criteria left it out."""

    number: int
    is_filtered: bool


class RowFile:
    """A JSONL file of rows, with file, line and reason; `"filtered": true` where reward criteria left the row out.

    Args:
        path: The file, in the run folder; None: rows are only remembered.
        what: What its rows are, for errors.
        data_path: The file of the data that rows are told of, as their `Origin` has it.
        source: The name of these rows in a mixture.

    Raises:
        ValueError: The file holds something else.
    """

    def __init__(self, path: Path | None, what: str, data_path: str, source: str = "") -> None:
        self.path = path
        self.what = what
        self.data_path = data_path
        self.source = source
        self._named: dict[Origin, bool] = {}
        self._offset = 0
        if path is not None and path.exists():
            with path.open("rb") as file:
                self._named |= self._read_new(file)

    def lines(self) -> list[Line]:
        """Those named so far, by any process, in this run of the program or before it was resumed."""
        return self._own(self._named)

    def name(self, rows: Sequence[Named]) -> tuple[list[Named], list[Line]]:
        """Writes the rows that no process has named yet.

        On a full disk the log names them instead, and they are written when they are met again and there is room: what a run
        cannot do without are its checkpoints, which have an option for that.

        Returns:
            Those that were written, and the lines that other processes have named since the last time.

        Raises:
            ValueError: The file cannot be written, and not because the disk is full.
        """
        new = [row for row in rows if row.origin not in self._named]
        others: dict[Origin, bool] = {}
        if new and self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a+b") as file:
                    with contextlib.suppress(OSError):  # without locks, on some network disks, a row may be named twice
                        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
                    others = self._read_new(file)
                    self._named |= others
                    file.truncate(self._offset)  # the rest of a line, by a process that was killed in it
                    new = [row for row in new if row.origin not in self._named]
                    lines = b"".join(_to_json_line(row) for row in new)
                    file.write(lines)
                self._offset += len(lines)  # a network disk may say only at the closing that it is full
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    for row in new:
                        log.warning("%s (%s) cannot name %s: %s", self.path, error.strerror, row.origin, row.reason)
                    return [], self._own(others)
                raise ValueError(
                    f"{self.path} cannot be written ({error.strerror}): make room or get the right to write there, "
                    "or give another run folder with --trainer.default_root_dir"
                ) from error
        self._named |= {row.origin: isinstance(row, FilteredRowError) for row in new}
        return new, self._own(others)

    def _own(self, named: dict[Origin, bool]) -> list[Line]:
        own = self.data_path, self.source
        return [Line(origin.line, kind) for origin, kind in named.items() if (origin.file, origin.source) == own]

    def _read_new(self, file: BinaryIO) -> dict[Origin, bool]:
        """The rows that were named since the last time."""
        file.seek(self._offset)
        complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        try:
            rows = [json.loads(line) for line in complete.split(b"\n") if line]
            return {Origin(row["file"], row["line"], row.get("source", "")): row.get("filtered", False) for row in rows}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} holds something else than {self.what} ({error!r}): delete or rename it") from error


def _to_json_line(named: RowError | RowChange) -> bytes:
    origin = named.origin
    row: dict[str, Any] = {"source": origin.source} if origin.source else {}
    row |= {"file": origin.file, "line": origin.line, "reason": named.reason}
    row |= {"filtered": True} if isinstance(named, FilteredRowError) else {}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair is escaped
