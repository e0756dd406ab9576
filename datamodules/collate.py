"""Examples to a batch: padding, and each medium once.

Shape suffixes: B rows, T tokens, N unique media items, O occurrences, S supervised positions, K choices.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.answer_rows import answer_rows
from datamodules.batch import (
    IGNORE_INDEX,
    MODALITIES,
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
    """
    examples, answers = answer_rows([item for item in items if isinstance(item, Example)])
    length = max((len(example.tokens) for example in examples), default=0)
    shape = (len(examples), length)
    tokens_BT = torch.full(shape, pad_id, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    positions_BT = torch.zeros(shape, dtype=torch.long)
    segments_BT = torch.zeros(shape, dtype=torch.long)
    starts = [0 if side == "right" else length - len(example.tokens) for example in examples]
    for row, (example, start) in enumerate(zip(examples, starts, strict=True)):
        size = len(example.tokens)
        span = slice(start, start + size)
        tokens_BT[row, span] = torch.tensor(example.tokens)
        labels_BT[row, span] = torch.tensor(example.labels)
        positions_BT[row, span] = torch.arange(size) if example.positions is None else torch.tensor(example.positions)
        segments_BT[row, span] = 1
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
        batch["answers"], batch["branches_BT"] = answers, torch.zeros(shape, dtype=torch.long)
        for row, (example, start) in enumerate(zip(examples, starts, strict=True)):
            branches = example.branches or []
            batch["branches_BT"][row, start : start + len(branches)] = torch.tensor(branches)
    for modality in MODALITIES:
        rows = [example.media.get(modality, []) for example in examples]
        if any(rows):
            batch[modality] = _stack_media(rows, starts)
            inputs = {row: example.inputs[modality] for row, example in enumerate(examples) if modality in example.inputs}
            if inputs:
                batch[modality]["inputs"] = {_items_of(batch[modality], row): values for row, values in inputs.items()}
    if any(example.token_types is not None for example in examples):
        token_types_BT = torch.zeros(shape, dtype=torch.long)
        for row, (example, start) in enumerate(zip(examples, starts, strict=True)):
            types = example.token_types or []
            token_types_BT[row, start : start + len(types)] = torch.tensor(types, dtype=torch.long)
        batch["token_types_BT"] = token_types_BT
    return batch


def _items_of(media: MediaBatch, row: int) -> tuple[int, ...]:
    return tuple(media["item_O"][media["row_O"] == row].tolist())


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


def _stack_media(rows: Sequence[Sequence[MediaItem]], starts: Sequence[int]) -> MediaBatch:
    places: dict[str, int] = {}
    unique: list[MediaItem] = []
    item_O, row_O, num_tokens_O, position_O = [], [], [], []
    for row, (items, start) in enumerate(zip(rows, starts, strict=True)):
        for item in items:
            if item.key not in places:
                places[item.key] = len(unique)
                unique.append(item)
            item_O.append(places[item.key])
            row_O.append(row)
            num_tokens_O.append(item.num_tokens)
            position_O.append(start + item.position)
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
