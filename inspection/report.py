"""What the doctor found, as one object: the figures behind the terminal's text, the JSON and the page.

Shape suffixes: N rows, K kinds of tokens, E bins.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from datamodules.batch import MODALITIES, Modality
from datamodules.prompt_options import PromptOptions
from datamodules.source import Split
from inspection.balance import Balance, find_balance
from inspection.findings import KINDS, Finding, Kind, Thresholds
from inspection.lengths import KINDS as TOKENS
from inspection.lengths import LengthSummary, composition, summarise
from inspection.measures import AudioMeasures, ImageMeasures
from inspection.recommend import Line
from inspection.records import Part, RowRecord

Reasons = Mapping[tuple[int, int], Sequence[Finding]]
"""Of each rejected row, its part and its number, why."""


@dataclass(frozen=True)
class PartCounts:
    """The rows of a part: rows = passed + rejected."""

    split: Split
    source: str
    file: str
    rows: int
    passed: int
    rejected: int


@dataclass(frozen=True)
class MediaSummary:
    """The media of one kind.

    Args:
        modality: The kind.
        occurrences: How many places in rows they have.
        different: How many different contents there are.
        size: The smallest, the median and the largest: pixels of images, pixels of a frame, seconds of sounds.
    """

    modality: Modality
    occurrences: int
    different: int
    size: tuple[float, float, float]


@dataclass(frozen=True)
class Lengths:
    """How long the rows are.

    Args:
        max_length: The limit.
        on_too_long: What it does to longer rows.
        refused: Rows that it refuses.
        cut: Rows that it cuts.
        dropped_tokens: Tokens that it cuts off.
        all: Of whole rows; None: no row could be tokenised.
        by_kind: Of their text, image, video and audio tokens.
        composition: For each bin of the histogram of whole rows the rows in it, shared out to the kinds of their tokens.
    """

    max_length: int
    on_too_long: str
    refused: int
    cut: int
    dropped_tokens: int
    all: LengthSummary | None
    by_kind: Mapping[str, LengthSummary]
    composition: list[list[float]]


@dataclass(frozen=True)
class Report:
    """All that is reported.

    Args:
        parts: The files and their rows.
        findings: What is wrong, by kind and then in the order of the rows.
        reject: The kinds of findings with which a row does not pass.
        thresholds: From where on something is found wanting.
        lengths: How long rows are.
        media: Their media.
        sharpness: Variance of the Laplacian of each different image.
        levels_db: Level of each different sound.
        balance: How often each closed answer is given.
        judged_rows: Validation and test rows with media.
        judged_words: How many of them have a question and answer that training rows have too, maybe about other media.
        lines: What to change in the configuration.
    """

    parts: list[PartCounts]
    findings: list[Finding]
    reject: tuple[Kind, ...]
    thresholds: Thresholds
    lengths: Lengths
    media: list[MediaSummary]
    sharpness: list[float]
    levels_db: list[float]
    balance: list[Balance]
    judged_rows: int
    judged_words: int
    lines: list[Line] = field(default_factory=list)

    @property
    def counts(self) -> dict[Kind, int]:
        """Findings of each kind that has some, in the order of the kinds."""
        counts = Counter(finding.kind for finding in self.findings)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    @property
    def rows(self) -> int:
        """All rows."""
        return sum(part.rows for part in self.parts)

    @property
    def rejected(self) -> int:
        """Rows that do not pass."""
        return sum(part.rejected for part in self.parts)

    def to_json(self) -> str:
        """The report as JSON. It says nothing of time or workers, so that the same data give the same bytes."""
        measured = {"sharpness", "levels_db", "findings", "lines", "lengths"}
        rest = {name: value for name, value in asdict(self).items() if name not in measured}
        findings = [_finding(finding) for finding in self.findings]
        tree = {
            "rows": self.rows,
            "passed": self.rows - self.rejected,
            "rejected": self.rejected,
            "counts": self.counts,
            **rest,
            "lengths": {name: value for name, value in asdict(self.lengths).items() if name != "composition"},
            "recommended": [asdict(line) for line in self.lines],
            "findings": findings,
        }
        return json.dumps(tree, indent=1, ensure_ascii=False, default=list) + "\n"


def make_report(
    parts: Sequence[Part],
    records: Sequence[RowRecord],
    findings: list[Finding],
    reject: Sequence[Kind],
    thresholds: Thresholds,
    prompt: PromptOptions,
) -> Report:
    """The report of a survey, without recommendations.

    Args:
        parts: The files.
        records: All their rows.
        findings: What is wrong with them.
        reject: The kinds of findings with which a row does not pass.
        thresholds: From where on something is found wanting.
        prompt: The limit on the length of a row.
    """
    unique = {medium.fingerprint.content: medium for record in records for medium in record.media}
    measures = [medium.measures for medium in unique.values()]
    words = {parts[r.part].split: set[bytes]() for r in records}
    for record in records:
        if record.text is not None:
            words[parts[record.part].split].add(record.text.digest)
    judged = [r.text.digest for r in records if parts[r.part].split in ("val", "test") and r.text is not None and r.media]
    return Report(
        parts=count_rows(parts, rejected_rows(findings, reject)),
        findings=findings,
        reject=tuple(reject),
        thresholds=thresholds,
        lengths=find_lengths(records, prompt),
        media=_summarise_media(records),
        sharpness=[measure.sharpness for measure in measures if isinstance(measure, ImageMeasures)],
        levels_db=[measure.level_db for measure in measures if isinstance(measure, AudioMeasures)],
        balance=find_balance(records, parts),
        judged_rows=len(judged),
        judged_words=sum(digest in words.get("train", set()) for digest in judged),
    )


def rejected_rows(findings: Sequence[Finding], reject: Sequence[Kind]) -> dict[tuple[int, int], list[Finding]]:
    """The rows that do not pass, each with its reasons."""
    rows: dict[tuple[int, int], list[Finding]] = {}
    for finding in findings:
        if finding.kind in reject:
            rows.setdefault((finding.place.part, finding.place.row), []).append(finding)
    return rows


def count_rows(parts: Sequence[Part], rejected: Reasons) -> list[PartCounts]:
    """The rows of each part: rows = passed + rejected."""
    counts = Counter(part for part, _ in rejected)
    sizes = [len(part.dataset) for part in parts]
    return [
        PartCounts(part.split, part.source, str(part.file.path), size, size - counts[number], counts[number])
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True))
    ]


def find_lengths(records: Sequence[RowRecord], prompt: PromptOptions) -> Lengths:
    """How long the rows are that can be tokenised."""
    tokens_NK = np.array([r.num_tokens for r in records if r.num_tokens], dtype=np.int64).reshape(-1, len(TOKENS))
    whole = summarise(tokens_NK.sum(axis=1))
    columns = {kind: tokens_NK[:, number] for number, kind in enumerate(TOKENS)}
    summaries = {kind: summarise(column[column > 0]) for kind, column in columns.items()}
    return Lengths(
        max_length=prompt.max_length,
        on_too_long=prompt.on_too_long,
        refused=sum(record.is_too_long for record in records),
        cut=sum(record.num_dropped > 0 for record in records),
        dropped_tokens=sum(record.num_dropped for record in records),
        all=whole,
        by_kind={kind: summary for kind, summary in summaries.items() if summary is not None},
        composition=[] if whole is None else composition(tokens_NK, whole.histogram).tolist(),
    )


def _summarise_media(records: Sequence[RowRecord]) -> list[MediaSummary]:
    summaries = []
    for modality in MODALITIES:
        media = [medium for record in records for medium in record.media if medium.modality == modality]
        if media:
            sizes = [m.seconds if modality == "audio" else float(m.shape[-2] * m.shape[-1]) for m in media]
            size = (min(sizes), float(np.median(sizes)), max(sizes))
            summaries.append(MediaSummary(modality, len(media), len({m.fingerprint.content for m in media}), size))
    return summaries


def _finding(finding: Finding) -> dict[str, Any]:
    """A finding as JSON."""
    source = {"source": finding.origin.source} if finding.origin.source else {}
    medium = {"medium": finding.medium} if finding.medium else {}
    place = {"split": finding.split, **source, "file": finding.origin.file, "line": finding.origin.line}
    return {"kind": finding.kind, **place, **medium, "reason": finding.reason}
