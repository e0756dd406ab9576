"""Batches whose rows are shown the media of others: does the model look at its media?

Shape suffixes: B rows, T positions, O occurrences of media.
"""

from typing import Any

import torch
from torch import Tensor

from datamodules.batch import MODALITIES, Batch, MediaBatch, Modality


def shuffle_media(batch: Batch) -> Batch | None:
    """The batch with other media in each row that has some, or None where no row can have others.

    Among rows with equally many media, of as many placeholders, each row gets those of the next one that has others, so that
    rows which share their media (several questions about one picture) do not get them again. The tokens stay as they are.
    """
    shuffled = dict(batch)
    moved = False
    for modality in MODALITIES:
        if modality in batch:
            item_O = _shuffle_items(batch[modality])
            moved |= not torch.equal(item_O, batch[modality]["item_O"])
            shuffled[modality] = {**batch[modality], "item_O": item_O}
    return shuffled if moved else None  # type: ignore[return-value]


def rows_with_other_media(batch: Batch, shuffled: Batch, modality: Modality) -> Tensor:
    """Which rows have other media of a modality in `shuffled` than in `batch`: moved_B, boolean."""
    moved_B = torch.zeros(len(batch["tokens_BT"]), dtype=torch.bool, device=batch["tokens_BT"].device)
    if modality in batch:
        media = batch[modality]
        moved_B[media["row_O"][media["item_O"] != shuffled[modality]["item_O"]]] = True
    return moved_B


def _shuffle_items(media: MediaBatch) -> Tensor:
    item_O = media["item_O"].clone()
    different: dict[Any, list[list[int]]] = {}  # by layout: the different items of the rows
    rows = [(media["row_O"] == row).nonzero().flatten() for row in media["row_O"].unique()]
    for occurrences in rows:
        items = media["item_O"][occurrences].tolist()
        group = different.setdefault(_layout(media, occurrences), [])
        if items not in group:
            group.append(items)
    for occurrences in rows:
        group = different[_layout(media, occurrences)]
        place = group.index(media["item_O"][occurrences].tolist())
        item_O[occurrences] = item_O.new_tensor(group[(place + 1) % len(group)])
    return item_O


def _layout(media: MediaBatch, occurrences: Tensor) -> Any:
    """What two rows must have in common for one to be shown the media of the other.

    Those are their numbers of placeholders, and for a ready model all that it reads besides pixels and sound: sizes and grids.
    """
    counts = tuple(media["num_tokens_O"][occurrences].tolist())
    if "inputs" not in media:
        return counts
    inputs = media["inputs"][tuple(media["item_O"][occurrences].tolist())]
    whole = {name: tuple(value.flatten().tolist()) for name, value in inputs.items() if not value.is_floating_point()}
    return counts, tuple((name, tuple(value.shape), whole.get(name)) for name, value in sorted(inputs.items()))
