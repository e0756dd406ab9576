"""Examples to a batch: padding, and each medium once.

Shape suffixes: B rows, T tokens, N unique media items, O occurrences, S supervised positions, K choices.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.batch import IGNORE_INDEX, MODALITIES, Batch, Example, MediaBatch, MediaItem, RowError


def collate(items: Sequence[Example | RowError], pad_id: int, side: Literal["left", "right"] = "right") -> Batch:
    """Makes a batch of examples.

    Args:
        items: Examples, and the errors of the rows that gave none.
        pad_id: Token at padded positions; any id that the model can embed.
        side: Where to pad: right for training, left for generation.
    """
    examples = [item for item in items if isinstance(item, Example)]
    length = max((len(example.tokens) for example in examples), default=0)
    shape = (len(examples), length)
    tokens_BT = torch.full(shape, pad_id, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    positions_BT = torch.zeros(shape, dtype=torch.long)
    segments_BT = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        span = slice(0, size) if side == "right" else slice(length - size, length)
        tokens_BT[row, span] = torch.tensor(example.tokens)
        labels_BT[row, span] = torch.tensor(example.labels)
        positions_BT[row, span] = torch.arange(size)
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
    for modality in MODALITIES:
        rows = [example.media.get(modality, []) for example in examples]
        if any(rows):
            batch[modality] = _stack_media(rows)
    return batch


def _describe(example: Example) -> dict[str, Any]:
    """What tables and predictions say of a row."""
    return {
        "id": example.id,
        "file": example.origin.file,
        "line": example.origin.line,
        "prompt": example.prompt,
        "reference": example.reference,
    }


def _stack_media(rows: Sequence[Sequence[MediaItem]]) -> MediaBatch:
    unique: dict[str, int] = {}
    media: list[Tensor] = []
    item_O, row_O, num_tokens_O = [], [], []
    for row, items in enumerate(rows):
        for item in items:
            if item.key not in unique:
                unique[item.key] = len(media)
                media.append(item.media)
            item_O.append(unique[item.key])
            row_O.append(row)
            num_tokens_O.append(item.num_tokens)
    padded, mask = pad_time(media)
    return MediaBatch(
        media=padded,
        mask=mask,
        item_O=torch.tensor(item_O),
        row_O=torch.tensor(row_O),
        num_tokens_O=torch.tensor(num_tokens_O),
    )


def pad_time(items: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stacks tensors that differ in their first dimension only; padding is 0.

    Returns:
        The stack (N, T, ...), and mask_NT, True where it is real; None where all have one length.
    """
    lengths = [len(item) for item in items]
    if len(set(lengths)) == 1:
        return torch.stack(list(items)), None
    mask_NT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pad_sequence(list(items), batch_first=True), mask_NT


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
