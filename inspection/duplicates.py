"""The same medium or row twice, on one side of the data or on both.

The sides are training, and what it is judged by: validation and test. What is on both is a leak, and is told of the training row.
Rows to predict are a side of their own.

Shape suffixes: N different media, P pairs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.source import Split
from inspection.findings import Kind, Place, Thresholds
from inspection.neighbours import near_pairs
from inspection.records import MediumRecord, Part, RowRecord
from inspection.texts import digest_of

TRAIN, JUDGED, ASKED = range(3)
SIDE: dict[Split, int] = {"train": TRAIN, "val": JUDGED, "test": JUDGED, "predict": ASKED}

SAME_LENGTH = 0.05
"""Two sounds can be nearly the same where their lengths differ by no more than this share."""


class Copy(NamedTuple):
    """A row or medium that is one with another: what is said of it, where it stands, and where the other does."""

    kind: Kind
    place: Place
    other: Place
    detail: str


@dataclass(slots=True)
class _Unique:
    """A medium, however often it occurs: where it does first, by side, and from which file."""

    medium: MediumRecord
    first: list[tuple[Place, bytes] | None] = field(default_factory=lambda: [None, None, None])


def find_copies(records: Iterable[RowRecord], parts: Sequence[Part], thresholds: Thresholds) -> list[Copy]:
    """All copies of media and rows, and all leaks, in the order of the rows.

    A medium that several rows take from one file is no copy. A row with media leaks by its media; the same question and answer
    about others is no leak. One without leaks by its words.

    Args:
        records: The rows, in order.
        parts: Their parts.
        thresholds: What is nearly the same.
    """
    records = list(records)
    sides = [SIDE[part.split] for part in parts]
    uniques: dict[bytes, _Unique] = {}
    copies = list(_find_media(records, sides, uniques))
    near = _Neighbours(list(uniques.values()), thresholds)
    copies += near.copies
    copies += _find_rows(records, sides)
    copies += _find_leaks(records, sides, uniques, near.leaks)
    return sorted(copies, key=lambda copy: (copy.place.part, copy.place.row, copy.place.medium or 0))


def _find_media(records: Iterable[RowRecord], sides: Sequence[int], uniques: dict[bytes, _Unique]) -> Iterator[Copy]:
    """Files with the content of another one of their side, each once; and notes all different media in `uniques`."""
    told: set[tuple[int, bytes]] = set()
    for record in records:
        side = sides[record.part]
        for number, medium in enumerate(record.media):
            place = Place(record.part, record.row, number)
            unique = uniques.setdefault(medium.fingerprint.content, _Unique(medium))
            first = unique.first[side]
            if first is None:
                unique.first[side] = place, medium.file
            elif first[1] != medium.file and (side, medium.file) not in told:
                told.add((side, medium.file))
                yield Copy("duplicate", place, first[0], "the same content")


def _find_rows(records: Iterable[RowRecord], sides: Sequence[int]) -> Iterator[Copy]:
    """Rows with the media and the words of an earlier one of their side; and training rows of words alone that are judged by."""
    first: list[dict[bytes, Place]] = [{}, {}, {}]
    texts: list[Place] = []
    keys: list[bytes] = []
    for record in records:
        if record.text is None or (record.problem and not record.is_too_long):
            continue
        place = Place(record.part, record.row)
        key = digest_of([record.text.digest.hex(), *(medium.fingerprint.content.hex() for medium in record.media)])
        earlier = first[sides[record.part]].setdefault(key, place)
        if earlier != place:
            yield Copy("repeated_row", place, earlier, "the same media and words")
        if sides[record.part] == TRAIN and not record.media:
            texts.append(place)
            keys.append(key)
    for place, key in zip(texts, keys, strict=True):
        if key in first[JUDGED]:
            yield Copy("leak", place, first[JUDGED][key], "the same question and answer")


def _find_leaks(
    records: Iterable[RowRecord], sides: Sequence[int], uniques: dict[bytes, _Unique], near: dict[bytes, tuple[Place, str]]
) -> Iterator[Copy]:
    for record in records:
        if sides[record.part] != TRAIN:
            continue
        for number, medium in enumerate(record.media):
            place, content = Place(record.part, record.row, number), medium.fingerprint.content
            judged = uniques[content].first[JUDGED]
            if judged is not None:
                yield Copy("leak", place, judged[0], "the same content")
            elif content in near:
                yield Copy("near_leak", place, *near[content])


class _Neighbours:
    """Media that are nearly the same.

    Attributes:
        copies: On one side: each that has an earlier neighbour, with the first of these.
        leaks: For the content of a training medium the first neighbour among what is judged by, and how near it is.
    """

    def __init__(self, uniques: Sequence[_Unique], thresholds: Thresholds) -> None:
        self.copies: list[Copy] = []
        self.leaks: dict[bytes, tuple[Place, str]] = {}
        self._thresholds = thresholds
        for modality in ("image", "video", "audio"):
            known = [u for u in uniques if u.medium.modality == modality and u.medium.fingerprint.pattern is not None]
            if known:
                self._search(known)

    def _search(self, uniques: Sequence[_Unique]) -> None:
        num = len(uniques)
        hashes_N = np.array([unique.medium.fingerprint.pattern for unique in uniques], dtype=np.uint64)
        sketches = np.frombuffer(b"".join(u.medium.fingerprint.sketch for u in uniques), np.uint8).reshape(num, -1)
        seconds_N = np.array([unique.medium.seconds for unique in uniques])
        present = np.array([[place is not None for place in unique.first] for unique in uniques])
        earlier = np.full((num, 3), num)  # for each side of a medium the first neighbour before it on the same side
        judged_N = np.full(num, num)
        for pairs_P2 in near_pairs(hashes_N, self._thresholds.near_bits):
            pairs_P2 = pairs_P2[_alike(pairs_P2, sketches, seconds_N, self._thresholds.near_colours)]
            low_P, high_P = pairs_P2.T
            for side in range(3):
                both_P = present[low_P, side] & present[high_P, side]
                np.minimum.at(earlier[:, side], high_P[both_P], low_P[both_P])
            for one_P, other_P in ((low_P, high_P), (high_P, low_P)):
                leaks_P = present[one_P, TRAIN] & present[other_P, JUDGED]
                np.minimum.at(judged_N, one_P[leaks_P], other_P[leaks_P])
        self._note(uniques, hashes_N, earlier, judged_N)

    def _note(
        self,
        uniques: Sequence[_Unique],
        hashes_N: NDArray[np.uint64],
        earlier: NDArray[np.int64],
        judged_N: NDArray[np.int64],
    ) -> None:
        num = len(uniques)

        def detail(one: int, other: int) -> str:
            bits = (int(hashes_N[one]) ^ int(hashes_N[other])).bit_count()
            return f"nearly the same content ({bits} of 64 bits apart)"

        for number, side in zip(*np.nonzero(earlier < num), strict=True):
            first, other = uniques[number].first[side], uniques[earlier[number, side]].first[side]
            assert first is not None and other is not None
            self.copies.append(Copy("near_duplicate", first[0], other[0], detail(number, earlier[number, side])))
        for number in np.flatnonzero(judged_N < num):
            other = uniques[judged_N[number]].first[JUDGED]
            assert other is not None
            self.leaks[uniques[number].medium.fingerprint.content] = other[0], detail(number, judged_N[number])


def _alike(
    pairs_P2: NDArray[np.int64], sketches: NDArray[np.uint8], seconds_N: NDArray[np.float64], near_colours: float
) -> NDArray[np.bool_]:
    """Of media whose patterns are near each other, those whose sketches and lengths are, too."""
    one, other = pairs_P2.T
    difference_P = np.abs(sketches[one].astype(np.int16) - sketches[other]).mean(axis=1)
    shorter_P, longer_P = np.sort(seconds_N[pairs_P2], axis=1).T
    return (difference_P <= near_colours) & (shorter_P >= (1 - SAME_LENGTH) * longer_P)
