"""Examples to a batch: padding, and each medium once.

Shape suffixes: B rows, T tokens, N unique media items, O occurrences, S supervised positions, K choices.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from datamodules.answer_rows import answer_rows
from datamodules.batch import (
    IGNORE_INDEX,
    MODALITIES,
    Answers,
    Batch,
    CachedFeatures,
    Example,
    MediaBatch,
    MediaItem,
    RowError,
    pad_time,
)


def collate(items: Sequence[Example | RowError], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Makes a batch of examples. Where answers are compared, one of them may take several rows; see `answer_rows`.

    Args:
        items: Examples, and the errors of the rows that gave none.
        pad_id: Token at padded positions; any id that the model can embed.
        side: Where to pad: right for training, left for generation.

    Examples with the same `slot`, which follow each other, are packed into one row; `examples` of the batch has one entry each.
    """
    given = [item for item in items if isinstance(item, Example)]
    examples, answers = answer_rows(given)
    places = _place(examples, [example.slot for example in given], [] if answers is None else answers["continues_B"], side)
    num_rows = 1 + max((place.row for place in places), default=-1)
    length = max((place.end for place in places), default=0)
    shape = (num_rows, length)
    tokens_BT = torch.full(shape, pad_id, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    positions_BT = torch.zeros(shape, dtype=torch.long)
    segments_BT = torch.zeros(shape, dtype=torch.long)
    for example, place in zip(examples, places, strict=True):
        assert place.segment == 1 or example.labels[0] == IGNORE_INDEX, "the first token of a packed sample follows another one"
        tokens_BT[place.row, place.span] = torch.tensor(example.tokens)
        labels_BT[place.row, place.span] = torch.tensor(example.labels)
        size = len(example.tokens)
        positions_BT[place.row, place.span] = torch.arange(size) if example.positions is None else torch.tensor(example.positions)
        segments_BT[place.row, place.span] = place.segment
    batch = Batch(
        tokens_BT=tokens_BT,
        labels_BT=labels_BT,
        positions_BT=positions_BT,
        segments_BT=segments_BT,
        choices_SK=_stack_choices(examples),
        examples=[_describe(example) for example in examples],
        skipped=[item for item in items if isinstance(item, RowError)],
        num_tokens=sum(len(example.tokens) for example in examples),
        num_supervised=int((labels_BT[:, 1:] != IGNORE_INDEX).sum()),
        num_dropped_tokens=sum(example.num_dropped_tokens for example in examples),
    )
    if answers is not None:
        batch["answers"], batch["branches_BT"] = _placed_answers(answers, places), torch.zeros(shape, dtype=torch.long)
        for example, place in zip(examples, places, strict=True):
            branches = torch.tensor(example.branches)
            batch["branches_BT"][place.row, place.span] = torch.where(branches > 0, branches + place.first_branch, 0)
    for modality in MODALITIES:
        rows = [example.media.get(modality, []) for example in examples]
        if any(rows):
            batch[modality] = _stack_media(rows, places)
            if any(modality in example.inputs for example in examples):
                items_of = batch[modality]["item_O"].split([len(items) for items in rows])
                batch[modality]["inputs"] = {
                    tuple(items_O.tolist()): example.inputs[modality]
                    for items_O, example in zip(items_of, examples, strict=True)
                    if modality in example.inputs
                }
    if any(example.token_types is not None for example in examples):
        token_types_BT = torch.zeros(shape, dtype=torch.long)
        for example, place in zip(examples, places, strict=True):
            token_types_BT[place.row, place.span] = torch.tensor(example.token_types or 0, dtype=torch.long)
        batch["token_types_BT"] = token_types_BT
    return batch


class Collate:
    """`collate` with its options, picklable."""

    def __init__(self, pad_id: int, side: Literal["left", "right"]) -> None:
        self.pad_id = pad_id
        self.side = side

    def __call__(self, items: Sequence[Example | RowError]) -> Batch:
        return collate(items, self.pad_id, self.side)


class _Place(NamedTuple):
    """Where an example stands in a batch; its answers are numbered from `first_branch` + 1."""

    row: int
    start: int
    end: int
    segment: int
    first_branch: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.end)


def _place(
    examples: Sequence[Example], slots: Sequence[int | None], continues: Sequence[bool], side: Literal["left", "right"]
) -> list[_Place]:
    """A row for each example, or for those that have one slot.

    Args:
        examples: Those of the batch; of the answers of one row of the data there may be several.
        slots: Of each row of the data.
        continues: Whether an example belongs to the same row of the data as the one before; empty: none does.
        side: Where padding goes.
    """
    places: list[_Place] = []
    length, number = max((len(example.tokens) for example in examples), default=0), -1
    for place, example in enumerate(examples):
        number += not (continues and continues[place])
        slot, size = slots[number], len(example.tokens)
        if slot is not None and place and slot == slots[number - (not (continues and continues[place]))]:
            last, branches = places[-1], examples[place - 1].branches or [0]
            places.append(_Place(last.row, last.end, last.end + size, last.segment + 1, last.first_branch + max(branches)))
        else:
            start = 0 if side == "right" else length - size
            places.append(_Place(places[-1].row + 1 if places else 0, start, start + size, 1, 0))
    return places


def _placed_answers(answers: Answers, places: Sequence[_Place]) -> Answers:
    """The answers where their examples stand."""
    examples = answers["row_A"].tolist()
    row_A = torch.tensor([places[example].row for example in examples])
    first_A = torch.tensor([places[example].first_branch for example in examples])
    return {**answers, "row_A": row_A, "branch_A": answers["branch_A"] + first_A, "example_A": examples}


def _describe(example: Example) -> dict[str, Any]:
    """What tables and predictions say of a row."""
    return {
        "id": example.id,
        **({"source": example.origin.source} if example.origin.source else {}),
        "file": example.origin.file,
        "line": example.origin.line,
        "prompt": example.prompt,
        "reference": example.reference,
    }


def _stack_media(rows: Sequence[Sequence[MediaItem]], places_of: Sequence[_Place]) -> MediaBatch:
    places: dict[str, int] = {}
    unique: list[MediaItem] = []
    item_O, row_O, num_tokens_O, position_O = [], [], [], []
    for items, place in zip(rows, places_of, strict=True):
        for item in items:
            if item.key not in places:
                places[item.key] = len(unique)
                unique.append(item)
            item_O.append(places[item.key])
            row_O.append(place.row)
            num_tokens_O.append(item.num_tokens)
            position_O.append(place.start + item.position)
    padded, mask = _pad([item.media for item in unique if not item.has_features])
    batch = MediaBatch(
        media=padded,
        mask=mask,
        item_O=torch.tensor(item_O),
        row_O=torch.tensor(row_O),
        num_tokens_O=torch.tensor(num_tokens_O),
        position_O=torch.tensor(position_O),
    )
    if any(item.has_features or item.feature_key for item in unique):
        features_CLD, mask_CL = _pad([item.media for item in unique if item.has_features])
        batch["cached"] = CachedFeatures(
            features_CLD=features_CLD,
            mask_CL=mask_CL,
            items=[number for number, item in enumerate(unique) if item.has_features],
            keys=[item.feature_key for item in unique if not item.has_features],
        )
    return batch


def _pad(items: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return pad_time(items) if items else (torch.empty(0), None)


def _stack_choices(examples: Sequence[Example]) -> Tensor:
    lists: list[list[int]] = []
    for example in examples:
        supervised = sum(label != IGNORE_INDEX for label in example.labels)
        choices = example.choices if example.choices is not None else [[]] * supervised
        assert len(choices) == supervised, f"{example.origin}: {len(choices)} lists of choices for {supervised} supervised tokens"
        lists += choices
    choices_SK = torch.full((len(lists), max((len(ids) for ids in lists), default=0)), -1, dtype=torch.long)
    for position, ids in enumerate(lists):
        choices_SK[position, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return choices_SK
