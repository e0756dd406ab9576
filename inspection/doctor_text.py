"""A report as text for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inspection.findings import TITLES
from inspection.recommend import as_yaml
from inspection.report import Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_LINES = 5
"""Findings of a kind that are shown in the terminal; the page and the JSON have more."""


def show_report(report: Report, written: Sequence[str] = (), console: "Console | None" = None) -> None:
    """Shows a report.

    Args:
        report: The report.
        written: The files that were written.
        console: Where to; None: standard output.
    """
    from rich import get_console
    from rich.padding import Padding
    from rich.text import Text

    console = get_console() if console is None else console
    console.print(_rows(report))
    for kind, count in report.counts.items():
        verdict = "these rows do not pass" if kind in report.reject else "these rows pass"
        console.print(Text.assemble((f"\n{TITLES[kind]}: {count:,}", "bold"), (f"  ({verdict})", "dim")))
        found = [finding for finding in report.findings if finding.kind == kind]
        for finding in found[:MOST_LINES]:
            medium = f"{finding.medium}: " if finding.medium and finding.medium not in finding.reason else ""
            console.print(Padding(Text(f"{finding.origin}: {medium}{finding.reason}"), (0, 0, 0, 2)))
        if len(found) > MOST_LINES:
            console.print(Text(f"  and {len(found) - MOST_LINES:,} more", "dim"))
    console.print()
    console.print(_lengths(report))
    console.print(Text(length_facts(report)))
    if report.media:
        console.print(_media(report))
    for balance in report.balance:
        answers = ", ".join(f"{answer} {count:,}" for answer, count in balance.answers[:10])
        console.print(Text(f"answers of {balance.part}: {answers} (always the first: {100 * balance.majority:.1f} % right)"))
    if report.judged_words:
        console.print(Text(words_fact(report)))
    console.print(Text(f"thresholds: {', '.join(f'{name} {value:g}' for name, value in vars(report.thresholds).items())}", "dim"))
    config = as_yaml(report.lines)
    console.print(
        Text("\nRecommended, as a second --config:" if config else "\nNothing in the configuration needs to change.", "bold")
    )
    console.print(Text(config), end="", soft_wrap=True)
    if written:
        console.print(Text(f"written: {', '.join(written)}"))


def length_facts(report: Report) -> str:
    """What the limit on the length does, in a sentence."""
    lengths = report.lengths
    share = f"{100 * lengths.refused / report.rows:.2f} %"
    text = f"prompt.max_length = {lengths.max_length:,} refuses {lengths.refused:,} of {report.rows:,} rows ({share})"
    if lengths.on_too_long == "cut":
        cut = f"{100 * lengths.cut / report.rows:.2f} %"
        text += f" and cuts {lengths.cut:,} ({cut}), {lengths.dropped_tokens:,} tokens of them"
    return text


def words_fact(report: Report) -> str:
    """How many questions and answers of validation are known from training, in a sentence."""
    return (
        f"{report.judged_words:,} of {report.judged_rows:,} validation and test rows with media have a question and answer that "
        "training rows have too, about these or other media"
    )


def _rows(report: Report) -> "Table":
    table = _table("", "file", "rows", "pass", "rejected")
    for part in report.parts:
        name = f"{part.source}/{part.split}" if part.source else part.split
        table.add_row(name, part.file, f"{part.rows:,}", f"{part.passed:,}", f"{part.rejected:,}")
    if len(report.parts) > 1:
        table.add_row("all", "", f"{report.rows:,}", f"{report.rows - report.rejected:,}", f"{report.rejected:,}", style="bold")
    return table


def _lengths(report: Report) -> "Table":
    table = _table("tokens", "rows", "50 %", "95 %", "99 %", "longest", "all together")
    summaries = {"a row": report.lengths.all, **report.lengths.by_kind}
    for name, summary in summaries.items():
        if summary is not None:
            numbers = (summary.num_rows, *summary.lines, summary.longest, summary.total)
            table.add_row(name, *(f"{number:,}" for number in numbers))
    return table


def _media(report: Report) -> "Table":
    table = _table("media", "in rows", "different", "smallest", "median", "largest", "unit")
    units = {"image": "pixels", "video": "pixels a frame", "audio": "seconds"}
    for media in report.media:
        sizes = (f"{size:,.1f}" if media.modality == "audio" else f"{size:,.0f}" for size in media.size)
        table.add_row(media.modality, f"{media.occurrences:,}", f"{media.different:,}", *sizes, units[media.modality])
    return table


def _table(*columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        is_number = name not in ("", "file", "tokens", "media", "unit")
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    return table
