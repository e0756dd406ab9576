"""The rows that could not be used: each named once, in a file that all processes of a run share."""

import contextlib
import fcntl
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from datamodules.batch import Origin, RowError

log = logging.getLogger(__name__)


class SkippedRows:
    """Names rows of a file in `skipped.jsonl`, and stops the run when they are too many.

    A row that stands in the file already, from an earlier epoch, another process or before a resume, is not written
    again. It counts when it is met, so that a row that was mended before the run was resumed does not. Rows that other
    processes name meanwhile count as well.

    Args:
        path: The file, in the run folder; None: only count.
        data_path: The file whose rows are counted, as their `Origin` has it.
        num_rows: How many of its rows are loaded.
        max_skipped: The share of them that may be skipped; unless it is 0, one row may be in any case.
        has_line: Whether a line of the file is one of these rows; None: every line is.
        source: The name of these rows in a mixture.
    """

    def __init__(
        self,
        path: Path | None,
        data_path: str,
        num_rows: int,
        max_skipped: float,
        has_line: Callable[[int], bool] | None = None,
        source: str = "",
    ) -> None:
        self.path = path
        self.data_path = data_path
        self.source = source
        self.num_rows = num_rows
        self.max_skipped = max_skipped
        # rounded first, since 0.29 * 100 is a little less than 29
        self.num_allowed = max(1, math.floor(round(max_skipped * num_rows, 6))) if max_skipped > 0 else 0
        self.has_line = has_line
        self._named: set[Origin] = set()
        self._met: set[int] = set()
        self._offset = 0
        if path is not None and path.exists():
            with path.open("rb") as file:
                self._named |= self._read_new(file)

    @property
    def count(self) -> int:
        """Rows that were skipped so far."""
        return len(self._met)

    def named_lines(self) -> list[int]:
        """Lines of these rows that were named so far, by any process, in this run of the program or before it was resumed."""
        own = self.data_path, self.source
        return [origin.line for origin in self._named if (origin.file, origin.source) == own]

    def add(self, errors: Sequence[RowError]) -> None:
        """Names rows.

        Raises:
            ValueError: More rows than `max_skipped` allows are skipped by now, or all; or the file cannot be written.
        """
        if not errors:
            return
        new = self._name(errors)
        self._met |= {error.origin.line for error in errors}
        where = f", see {self.path}" if self.path is not None else ""
        name = f" (source {self.source!r})" if self.source else ""
        if new:
            log.warning("skipped %d row(s), %d so far%s; the last: %s", len(new), self.count, where, new[-1])
        if self.count == self.num_rows or self.count > self.num_allowed:
            limit = f"and data.max_skipped = {self.max_skipped} allows {self.num_allowed:,}"
            raise ValueError(
                f"{self.count:,} of {self.num_rows:,} rows ({100 * self.count / self.num_rows:.3g} %) "
                f"from {self.data_path}{name} could not be used, {limit if self.count < self.num_rows else 'so none is left'}. "
                f"The last one is {errors[-1]}. Mend these rows{where}, or raise data.max_skipped"
            )

    def _name(self, errors: Sequence[RowError]) -> list[RowError]:
        """Writes those that no process has named yet, and returns them."""
        new = [error for error in errors if error.origin not in self._named]
        if new and self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a+b") as file:
                    with contextlib.suppress(OSError):  # without locks, on some network disks, a row may be named twice
                        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
                    others = self._read_new(file)
                    own = self.data_path, self.source
                    lines = {origin.line for origin in others if (origin.file, origin.source) == own}
                    self._met |= lines if self.has_line is None else set(filter(self.has_line, lines))
                    self._named |= others
                    file.truncate(self._offset)  # the rest of a line, by a process that was killed in it
                    new = [error for error in new if error.origin not in self._named]
                    self._offset += file.write(b"".join(_to_json_line(error) for error in new))
            except OSError as error:
                raise ValueError(
                    f"{self.path} cannot be written ({error.strerror}): make room or get the right to write there, "
                    "or give another run folder with --trainer.default_root_dir"
                ) from error
        self._named |= {error.origin for error in new}
        return new

    def _read_new(self, file: BinaryIO) -> set[Origin]:
        """The rows that were named since the last time."""
        file.seek(self._offset)
        complete, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        try:
            rows = [json.loads(line) for line in complete.split(b"\n") if line]
            return {Origin(row["file"], row["line"], row.get("source", "")) for row in rows}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} holds something else than skipped rows ({error!r}): delete or rename it") from error


def _to_json_line(error: RowError) -> bytes:
    origin = error.origin
    source = {"source": origin.source} if origin.source else {}
    row = {**source, "file": origin.file, "line": origin.line, "reason": error.reason}
    text = json.dumps(row, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # half of a surrogate pair becomes its JSON escape
