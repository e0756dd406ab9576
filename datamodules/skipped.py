"""The rows that could not be used: each named once, in a file that all processes of a run share."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from datamodules.batch import FilteredRowError, RowError
from datamodules.named_rows import Line, RowFile

log = logging.getLogger(__name__)


class SkippedRows:
    """Names rows of a file in `skipped.jsonl`, and stops the run when they are too many.

    A row that stands in the file already, from an earlier epoch, another process or before a resume, is not written
    again. It counts when it is met, so that a row that was mended before the run was resumed does not. Rows that other
    processes name meanwhile count as well. Rows that reward criteria leave out are named too, and are none too many.

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
        self._file = RowFile(path, "skipped rows", data_path, source)
        self._met: set[int] = set()
        self._filtered: set[int] = set()

    @property
    def count(self) -> int:
        """Rows that could not be used so far."""
        return len(self._met)

    @property
    def num_filtered(self) -> int:
        """Rows that reward criteria left out so far."""
        return len(self._filtered)

    def named_lines(self) -> list[int]:
        """Lines of these rows that were named so far, by any process, in this run of the program or before it was resumed."""
        return [line.number for line in self._file.lines()]

    def add(self, errors: Sequence[RowError]) -> None:
        """Names rows.

        Raises:
            ValueError: More rows than `max_skipped` allows are skipped by now, or all; or the file cannot be written.
        """
        if not errors:
            return
        new, others = self._file.name(errors)
        met = [Line(error.origin.line, isinstance(error, FilteredRowError)) for error in errors]
        for line in (*met, *others):
            if self.has_line is None or self.has_line(line.number):
                (self._filtered if line.is_filtered else self._met).add(line.number)
        where = f", see {self.path}" if self.path is not None else ""
        name = f" (source {self.source!r})" if self.source else ""
        filtered = f", {self.num_filtered} of them by data.reward_criteria" if self.num_filtered else ""
        num_gone = self.count + self.num_filtered
        if new:
            log.warning("skipped %d row(s), %d so far%s%s; the last: %s", len(new), num_gone, filtered, where, new[-1])
        if num_gone == self.num_rows or self.count > self.num_allowed:
            limit = f"and data.max_skipped = {self.max_skipped} allows {self.num_allowed:,}"
            none_left = f"so none is left{f' (data.reward_criteria left out {self.num_filtered:,})' if self.num_filtered else ''}"
            raise ValueError(
                f"{self.count:,} of {self.num_rows:,} rows ({100 * self.count / self.num_rows:.3g} %) "
                f"from {self.data_path}{name} could not be used, {limit if num_gone < self.num_rows else none_left}. "
                f"The last one is {errors[-1]}. Mend these rows{where}, or raise data.max_skipped"
            )
