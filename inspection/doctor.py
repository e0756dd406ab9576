"""The command `doctor`: reads all data once, and says what is wrong with them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from inspection.findings import REJECTED, Kind, Thresholds
from inspection.scorers import PairScorer

if TYPE_CHECKING:
    from datamodules.loading import RowDataModule
    from inspection.recommend import Line
    from inspection.records import Part, RowRecord
    from inspection.report import Report
    from lightning_modules.commands import Setup


def doctor(
    setup: "Setup",
    html: str | None = None,
    json: str | None = None,
    clean: str | None = None,
    reject: list[Kind] | None = None,
    thresholds: Thresholds | None = None,
    scorer: PairScorer | None = None,
) -> None:
    """Reads all rows of all splits once, without a model, and reports what is wrong with them and what to set.

    Each row is read as training reads it, by `data.num_workers` processes. Reported are rows that cannot be used; images that are
    blurred or blank; sounds that are silent or clipped; videos that are black or frozen; copies, and nearly copies, of media;
    what training shares with validation and test; lengths in tokens; and how often each closed answer is given.

    Args:
        html: Also write a page with plots and thumbnails, which needs nothing beside itself.
        json: Also write all findings and figures as JSON.
        clean: Also write the rows that pass: those of training to this file, those of other splits and sources beside it
            (`out.val.jsonl`, `out.<source>.jsonl`), and the others with their reasons to `out.rejected.jsonl`.
        reject: The kinds of findings with which a row does not pass; None: all but `duplicate` and `near_duplicate`, for these
            are files and not rows.
        thresholds: From where on something is found wanting; `--thresholds.blur 50` sets one of them.
        scorer: Scores how well media fit their text, such as `CLIPScorer`; None: nobody does.

    Raises:
        ValueError: An option, or a file of the data, cannot be used.
    """
    from inspection.clean import check_clean, write_clean, write_lines
    from inspection.doctor_page import make_page
    from inspection.doctor_text import show_report
    from inspection.report import rejected_rows
    from inspection.survey import find_parts

    parts = find_parts(setup.datamodule)
    if clean is not None:
        check_clean(parts, Path(clean))  # before the data are read
    records = read_all(parts, setup.datamodule.num_workers, scorer)
    kinds = REJECTED if reject is None else reject
    report = examine(setup.datamodule, parts, records, kinds, thresholds or Thresholds(), scorer)
    if clean is not None:
        paths = write_clean(parts, rejected_rows(report.findings, report.reject), Path(clean))
        kept = [line for line in report.lines if line.option != "data.max_skipped"]  # none is left to be skipped
        report = replace(report, lines=kept + cleaned_lines(parts, paths))
    if json is not None:
        write_lines(Path(json), [report.to_json().encode("utf-8", "backslashreplace")])
    if html is not None:
        page = make_page(report, parts)
        write_lines(Path(html), [page.encode("utf-8", "backslashreplace")])
    show_report(report, [path for path in (html, json, clean) if path is not None])


def read_all(parts: "Sequence[Part]", num_workers: int, scorer: PairScorer | None = None) -> "list[RowRecord]":
    """The records of all rows, in order, with a bar that shows how far it is."""
    from rich.progress import track

    from inspection.survey import Tasks, survey

    num_tasks = len(Tasks([len(part.dataset) for part in parts]))
    tasks = track(survey(parts, num_workers, scorer), "reading", num_tasks, transient=True)
    return [record for records in tasks for record in records]


def examine(
    datamodule: "RowDataModule",
    parts: "Sequence[Part]",
    records: "Sequence[RowRecord]",
    reject: Sequence[Kind] = REJECTED,
    thresholds: Thresholds = Thresholds(),  # it is frozen
    scorer: PairScorer | None = None,
) -> "Report":
    """The report of all rows, with recommendations.

    Args:
        datamodule: Whose options are judged.
        parts: Its files.
        records: All their rows, in order.
        reject: The kinds of findings with which a row does not pass.
        thresholds: From where on something is found wanting.
        scorer: It says from which score on a medium fits its text.
    """
    from inspection.diagnosis import diagnose
    from inspection.report import make_report

    findings = diagnose(records, parts, thresholds, scorer.min_score if scorer is not None else 0.0)
    prompt = parts[0].dataset.processor.prompt
    report = make_report(parts, records, findings, reject, thresholds, prompt)
    return replace(report, lines=recommended_lines(datamodule, parts, records))


def recommended_lines(datamodule: "RowDataModule", parts: "Sequence[Part]", records: "Sequence[RowRecord]") -> "list[Line]":
    """What to change in the configuration of a data module, from its rows."""
    import numpy as np

    from datamodules.source import source_option
    from inspection.excess import limit_of
    from inspection.recommend import recommend_limits, recommend_max_length, recommend_max_skipped, recommend_validation

    prompt = parts[0].dataset.processor.prompt
    lengths_N = np.array([sum(record.num_tokens) for record in records if record.num_tokens], dtype=np.int64)
    lines = recommend_max_length(lengths_N, prompt.max_length, prompt.on_too_long)
    max_length = int(lines[0].value) if lines else prompt.max_length
    unusable = {part.name: (0, len(part.dataset)) for part in parts}
    excess = []
    for record in records:
        part = parts[record.part]
        is_bad = sum(record.num_tokens) > max_length and record.is_too_long if record.num_tokens else not record.excess
        count, rows = unusable[part.name]
        unusable[part.name] = count + is_bad, rows
        limits, option = part.dataset.limits, f"{source_option(part.source)}.limits"
        excess += [(option, medium, limit_of(limits, medium.limit)) for medium in record.excess]
    lines += recommend_limits(excess)
    lines += recommend_max_skipped(unusable, datamodule.max_skipped)
    has_judged = any(part.split in ("val", "test") for part in parts)
    for part in parts:
        if part.split == "train":
            lines += recommend_validation(has_judged, source_option(part.source), len(part.dataset))
    return lines


def cleaned_lines(parts: "Sequence[Part]", paths: Sequence[Path]) -> "list[Line]":
    """The options that take the cleaned files, whose media lie where they lay."""
    from datamodules.source import source_option
    from inspection.recommend import Line

    lines = {}
    for part, path in zip(parts, paths, strict=True):
        option = source_option(part.source)
        lines[f"{option}.{part.split}_path"] = Line(f"{option}.{part.split}_path", str(path), "the rows that pass")
        root = str(part.dataset.media_root.path)
        if root != str(path.parent.resolve()):
            name = f"{option}.media_root"
            lines.setdefault(name, Line(name, root, "media lie where they lay"))
    return list(lines.values())
