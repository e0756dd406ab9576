"""Sequences that begin alike as one row: what they share once, then the rest of each as a branch. Pure functions."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from datamodules.batch import IGNORE_INDEX, MODALITIES, Example, MediaItem, Modality


def join(sides: Sequence[Example], share: bool = True) -> list[Example]:
    """Puts sequences into one row where they share their prompt, else into a row of its own each.

    What is shared ends one token before the first place where tokens or media differ or something is supervised. Each branch
    begins with the token before that place, without a label, so that in a branch, too, a token is predicted by the one before it.

    The prompt is shared if that stretch is at least half of it, and does not end within a medium.

    Args:
        sides: The sequences, at least one; each with something supervised.
        share: Whether they may be in one row.

    Returns:
        Rows with `branches` and `positions`; the sequences are branch 1, 2, … of one row, or branch 1 of each.
    """
    num_shared = shared_length(sides) if share and len(sides) > 1 else 0
    if num_shared == 0:
        return [_as_branch(side) for side in sides]
    first = sides[0]
    row = replace(
        first,
        tokens=first.tokens[:num_shared],
        labels=[IGNORE_INDEX] * num_shared,
        positions=[*range(num_shared)],
        branches=[0] * num_shared,
        token_types=None if first.token_types is None else first.token_types[:num_shared],
        media={modality: [item for item in items if item.position < num_shared] for modality, items in first.media.items()},
        choices=None,
        num_dropped_tokens=sum(side.num_dropped_tokens for side in sides),
    )
    for branch, side in enumerate(sides, 1):
        _append(row, side, num_shared, branch)
    return [row]


def shared_length(sides: Sequence[Example]) -> int:
    """How many tokens sequences share at their beginning; 0 where they are to be rows of their own."""
    prompt = min(_first_label(side) for side in sides)
    place = min((_first_difference(sides[0], side, prompt) for side in sides[1:]), default=prompt)
    num_shared = place - 1
    if 2 * num_shared < prompt or num_shared < 1 or any(_lies_within(place - 1, item) for _, item in in_order(sides[0])):
        return 0
    # what a ready model reads of a row's media comes as a whole
    has_own_media = any(item.position >= num_shared for side in sides for _, item in in_order(side))
    return 0 if has_own_media and any(side.inputs for side in sides) else num_shared


def in_order(example: Example) -> list[tuple[Modality, MediaItem]]:
    """The media of an example in the order in which they stand in it."""
    items = [(modality, item) for modality in MODALITIES for item in example.media.get(modality, [])]
    return sorted(items, key=lambda pair: pair[1].position)


def answer_start(example: Example) -> int:
    """Index of the first supervised token."""
    return _first_label(example)


def _first_label(example: Example) -> int:
    return next(place for place, label in enumerate(example.labels) if label != IGNORE_INDEX)


def _first_difference(one: Example, other: Example, end: int) -> int:
    """The first place before `end` where the tokens or the media of two sequences differ; `end` if there is none."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one.tokens[:end], other.tokens[:end], strict=False))
    end = sum(1 for _ in same)
    places = [_identities(example, end) for example in (one, other)]
    differing = set(places[0]) ^ set(places[1])
    return min((position for position, *_ in differing), default=end)


def _identities(example: Example, end: int) -> list[tuple[int, str, str, int]]:
    items = in_order(example)
    return [(item.position, modality, item.key, item.num_tokens) for modality, item in items if item.position < end]


def _lies_within(place: int, item: MediaItem) -> bool:
    return item.position <= place < item.position + item.num_tokens


def _as_branch(side: Example) -> Example:
    size = len(side.tokens)
    return replace(side, positions=[*range(size)], branches=[1] * size, choices=None)


def _append(row: Example, side: Example, start: int, branch: int) -> None:
    offset = len(row.tokens) - start
    size = len(side.tokens) - start
    row.tokens += side.tokens[start:]
    row.labels += side.labels[start:]
    assert row.positions is not None and row.branches is not None
    row.positions += range(start, start + size)
    row.branches += [branch] * size
    if row.token_types is not None and side.token_types is not None:
        row.token_types += side.token_types[start:]
    for modality, item in in_order(side):
        if item.position >= start:
            row.media.setdefault(modality, []).append(replace(item, position=item.position + offset))
