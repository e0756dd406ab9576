"""Copies and leaks: what counts as one, on which side of the data, and which row is told."""

from typing import Any

import numpy as np
import pytest

from inspection.duplicates import find_copies
from inspection.findings import Place, Thresholds
from inspection.fingerprints import Fingerprint
from inspection.measures import ImageMeasures
from inspection.records import MediumRecord, Part, RowRecord
from inspection.texts import RowText, digest_of

SHARP = ImageMeasures(500.0, 50.0, 200.0, 20.0)
PARTS = [Part("train", None), Part("val", None), Part("test", None), Part("predict", None)]  # type: ignore[arg-type]
TRAIN, VAL, TEST, PREDICT = range(4)


def medium(content: str, file: str = "", pattern: int | None = None, grey: int = 0, **options: Any) -> MediumRecord:
    known = Fingerprint(content.encode(), pattern, bytes([grey]) * 48)
    defaults = {"modality": "image", "shape": (4, 4), "seconds": 0.0, "measures": SHARP}
    name = file or content
    return MediumRecord(name=name, file=name.encode(), fingerprint=known, **(defaults | options))


def rows(*given: tuple[int, str, list[MediumRecord]]) -> list[RowRecord]:
    """Rows of (part, words, media), numbered within their parts."""
    counts = dict.fromkeys(range(4), -1)
    records = []
    for part, words, media in given:
        counts[part] += 1
        records.append(
            RowRecord(part, counts[part], num_tokens=(1, 0, 0, 0), media=tuple(media), text=RowText(digest_of([words])))
        )
    return records


def found(records: list[RowRecord], thresholds: Thresholds = Thresholds()) -> list[tuple[str, Place, Place]]:
    return [(copy.kind, copy.place, copy.other) for copy in find_copies(records, PARTS, thresholds)]


def test_several_questions_about_one_file_are_no_copies() -> None:
    assert found(rows((TRAIN, "a", [medium("x")]), (TRAIN, "b", [medium("x")]), (TRAIN, "c", []), (TRAIN, "d", []))) == []


def test_another_file_with_the_same_content_is_told_once() -> None:
    records = rows(*((TRAIN, str(number), [medium("x", file)]) for number, file in enumerate("abba")))
    assert found(records) == [("duplicate", Place(TRAIN, 1, 0), Place(TRAIN, 0, 0))]


@pytest.mark.parametrize("judged", [VAL, TEST])
def test_each_training_row_with_a_medium_of_the_other_side_leaks(judged: int) -> None:
    records = rows((TRAIN, "a", [medium("y"), medium("x")]), (TRAIN, "b", [medium("x")]), (judged, "c", [medium("x", "other")]))
    expected = [("leak", Place(TRAIN, 0, 1), Place(judged, 0, 0)), ("leak", Place(TRAIN, 1, 0), Place(judged, 0, 0))]
    assert found(records) == expected


def test_words_leak_alone_where_there_are_no_media() -> None:
    records = rows((TRAIN, "a", []), (TRAIN, "b", [medium("x")]), (VAL, "a", []), (VAL, "b", [medium("y")]))
    assert found(records) == [("leak", Place(TRAIN, 0), Place(VAL, 0))]


def test_rows_to_predict_are_a_side_of_their_own() -> None:
    records = rows((TRAIN, "a", [medium("x")]), (PREDICT, "a", [medium("x", "copy")]), (PREDICT, "a", [medium("x", "copy")]))
    assert found(records) == [("repeated_row", Place(PREDICT, 1), Place(PREDICT, 0))]


def test_the_same_row_again_is_told_of_the_later_one() -> None:
    records = rows(*((TRAIN, words, [medium(name)]) for words, name in ("ax", "ay", "ax", "bx", "ax")))
    assert found(records) == [("repeated_row", Place(TRAIN, row), Place(TRAIN, 0)) for row in (2, 4)]


def test_near_media_are_near_in_pattern_and_colours_and_length() -> None:
    first, near, far, red, none = 0, 0b111111, 0b1111111 << 20, 0, None
    records = rows(
        (TRAIN, "0", [medium("0", pattern=first)]),
        (TRAIN, "1", [medium("1", pattern=near, grey=10)]),
        (TRAIN, "2", [medium("2", pattern=far)]),
        (TRAIN, "3", [medium("3", pattern=red, grey=11 + 10)]),
        (TRAIN, "4", [medium("4", pattern=none)]),
        (TRAIN, "5", [medium("5", pattern=none)]),
        (TRAIN, "6", [medium("6", pattern=first, modality="audio", seconds=10.0)]),
        (TRAIN, "7", [medium("7", pattern=first, modality="audio", seconds=10.6)]),
        (TRAIN, "8", [medium("8", pattern=first, modality="audio", seconds=10.4)]),
    )
    assert found(records) == [
        ("near_duplicate", Place(TRAIN, 1, 0), Place(TRAIN, 0, 0)),
        ("near_duplicate", Place(TRAIN, 8, 0), Place(TRAIN, 6, 0)),
    ]
    assert len(found(records, Thresholds(near_bits=7, near_colours=30))) == 4


def test_a_near_leak_is_told_of_every_training_row_and_gives_way_to_a_leak() -> None:
    records = rows(
        (TRAIN, "0", [medium("0", pattern=1)]),
        (TRAIN, "1", [medium("0", pattern=1)]),
        (TRAIN, "2", [medium("9", pattern=0xFFFF << 20)]),
        (VAL, "3", [medium("8", pattern=5)]),
        (VAL, "4", [medium("9", pattern=0xFFFF << 20)]),
    )
    near = [copy for copy in found(records) if copy[0] != "near_duplicate"]
    assert near == [
        ("near_leak", Place(TRAIN, 0, 0), Place(VAL, 0, 0)),
        ("near_leak", Place(TRAIN, 1, 0), Place(VAL, 0, 0)),
        ("leak", Place(TRAIN, 2, 0), Place(VAL, 1, 0)),
    ]


def test_near_copies_are_those_of_all_pairs() -> None:
    generator = np.random.default_rng(5)
    patterns = [int(value) for value in generator.integers(0, 2**10, 120)]
    records = rows(*((TRAIN, str(number), [medium(str(number), pattern=p)]) for number, p in enumerate(patterns)))
    expected = []
    for number, one in enumerate(patterns):
        before = [other for other in range(number) if (one ^ patterns[other]).bit_count() <= 2]
        expected += [("near_duplicate", Place(TRAIN, number, 0), Place(TRAIN, before[0], 0))] if before else []
    assert found(records, Thresholds(near_bits=2)) == expected
