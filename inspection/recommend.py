"""Lines of a configuration that follow from the data, each with its reason.

Shape suffixes: N rows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inspection.excess import Excess
from inspection.lengths import covering, share_above

STEP = 32
"""Lengths are recommended in steps of so many tokens."""

NEARLY_ALL = 1.25
"""Where the longest row is at most this many times as long as 99 % of them, the limit is set to it."""


@dataclass(frozen=True)
class Line:
    """A line of a configuration.

    Args:
        option: Its option, with dots.
        value: Its value, as YAML has it.
        reason: Why.
    """

    option: str
    value: str
    reason: str


def recommend_max_length(lengths_N: NDArray[np.int64], max_length: int, on_too_long: str) -> list[Line]:
    """The limit on the length of a row, from the line that 99 % of the rows do not exceed; nothing where it can stay.

    Args:
        lengths_N: Tokens of each row, before anything is cut.
        max_length: The limit as it is.
        on_too_long: What it does to longer rows, "skip" or "cut".
    """
    if not len(lengths_N):
        return []
    line, longest = covering(lengths_N, 0.99), int(lengths_N.max())
    wanted = _round_up(longest if longest <= NEARLY_ALL * line else line, STEP)
    above, left = share_above(lengths_N, max_length), share_above(lengths_N, wanted)
    does = "refuses" if on_too_long == "skip" else "cuts"
    facts = f"99 % of the rows have at most {line:,} tokens, the longest has {longest:,}"
    if above > 0 and wanted > max_length:
        now = f"max_length = {max_length:,} {does} {_percent(above)} of them, this one {_percent(left)}"
        return [Line("model.prompt.max_length", str(wanted), f"{facts}; {now}")]
    if longest < max_length / 2 and wanted < max_length:
        now = f"max_length = {max_length:,} lets rows pass that are like none of these, and take memory"
        return [Line("model.prompt.max_length", str(wanted), f"{facts}; {now}")]
    return []


def recommend_max_skipped(unusable: Mapping[str, tuple[int, int]], max_skipped: float) -> list[Line]:
    """The share of rows that may be skipped, where more of them cannot be used; nothing where a run would not stop.

    Args:
        unusable: Of each split and source, how many rows cannot be used, under the limits that are recommended, and how many
            rows there are.
        max_skipped: The share as it is.
    """
    stopping = {
        name: (count, rows)
        for name, (count, rows) in unusable.items()
        if count > (max(1, math.floor(round(max_skipped * rows, 6))) if max_skipped > 0 else 0) and count < rows
    }
    if not stopping:
        return []
    worst, (count, rows) = max(stopping.items(), key=lambda item: item[1][0] / item[1][1])
    value = min(math.ceil(1000 * count / rows) / 1000, 1.0)
    reason = (
        f"{count:,} of {rows:,} rows of {worst} cannot be used ({_percent(count / rows)}), and max_skipped = {max_skipped:g} "
        "stops the run there; mending or cleaning the rows is better"
    )
    return [Line("data.max_skipped", f"{value:g}", reason)]


def recommend_limits(excess: Iterable[tuple[str, Excess, float]]) -> list[Line]:
    """Limits that let the media pass that were refused for their size alone.

    Args:
        excess: The option of the limits ("data.limits"), each medium over one of them, and that limit.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for option, medium, limit in excess:
        found.setdefault(f"{option}.{medium.limit}", []).append((medium.value, limit))
    lines = []
    for option, values in sorted(found.items()):
        largest, limit = max(value for value, _ in values), values[0][1]
        media = "1 medium is" if len(values) == 1 else f"{len(values):,} media are"
        reason = f"{media} above {limit:,.10g} and can be read otherwise; the largest is {largest:,.10g}"
        lines.append(Line(option, f"{math.ceil(largest)}", reason))
    return lines


def recommend_validation(has_judged: bool, option: str, num_train: int) -> list[Line]:
    """Rows to hold out, where none are.

    Args:
        has_judged: Whether there are validation or test rows.
        option: What the source is called, "data".
        num_train: Training rows.
    """
    if has_judged or num_train < 20:
        return []
    share = 0.05 if num_train < 100_000 else round(5000 / num_train, 3)
    return [Line(f"{option}.val_fraction", f"{share:g}", "there are no validation rows, so that overfitting would go unseen")]


def as_yaml(lines: Sequence[Line]) -> str:
    """The lines as a configuration that goes after the recipe, with the reasons as comments."""
    text: list[str] = []
    open_keys: list[str] = []
    for line in sorted(lines, key=lambda line: line.option):
        *groups, name = _as_config(line.option)
        shared = 0
        while shared < min(len(groups), len(open_keys)) and groups[shared] == open_keys[shared]:
            shared += 1
        text += [f"{'  ' * depth}{group}:" for depth, group in enumerate(groups) if depth >= shared]
        open_keys = groups
        text.append(f"{'  ' * len(groups)}{name}: {line.value}  # {line.reason}")
    return "\n".join(text) + "\n" if text else ""


def _as_config(option: str) -> list[str]:
    first, *rest = option.split(".")
    return [first, "init_args", *rest]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
