"""From what the rows were read as to what is wrong with them."""

from collections.abc import Iterator, Sequence

from inspection.duplicates import find_copies
from inspection.findings import KINDS, Finding, Kind, Place, Thresholds, judge
from inspection.records import Part, RowRecord


def diagnose(
    records: Sequence[RowRecord], parts: Sequence[Part], thresholds: Thresholds, min_score: float = 0.0
) -> list[Finding]:
    """All findings, by kind and then in the order of the rows.

    Args:
        records: All rows, in order.
        parts: Their parts.
        thresholds: From where on something is found wanting.
        min_score: A medium whose score is below it does not fit its text.
    """
    by_place = {(record.part, record.row): record for record in records}

    def finding(kind: Kind, place: Place, reason: str, other: Place | None = None) -> Finding:
        part, record = parts[place.part], by_place[place.part, place.row]
        medium = "" if place.medium is None or place.medium >= len(record.media) else record.media[place.medium].name
        return Finding(kind, place, reason, part.split, part.origin(place.row), medium, other)

    found = [finding(kind, place, reason) for record in records for kind, place, reason in _of_row(record, thresholds, min_score)]
    for copy in find_copies(records, parts, thresholds):
        other = finding(copy.kind, copy.other, "")
        name = f"{other.medium} of {other.origin}" if other.medium else str(other.origin)
        split = f" ({other.split})" if other.split != parts[copy.place.part].split else ""
        found.append(finding(copy.kind, copy.place, f"{copy.detail} as {name}{split}", copy.other))
    return sorted(found, key=lambda f: (KINDS.index(f.kind), f.place.part, f.place.row, f.place.medium or 0))


def _of_row(record: RowRecord, thresholds: Thresholds, min_score: float) -> Iterator[tuple[Kind, Place, str]]:
    """What is wrong with a row by itself."""
    place = Place(record.part, record.row)
    if record.problem:
        yield "too_long" if record.is_too_long else "unreadable", place, record.problem
    if record.text is not None and record.text.has_same_sides:
        yield "identical_sides", place, "the chosen and the rejected answer are the same, so that there is nothing to prefer"
    for number, medium in enumerate(record.media):
        there = Place(record.part, record.row, number)
        for kind, reason in judge(medium.measures, thresholds):
            yield kind, there, reason
        if medium.score is not None and medium.score < min_score:
            yield "mismatch", there, f"the scorer gives {medium.score:.3f}, below min_score = {min_score:g}"
