"""Rows whose media are blank, and as large as their headers say: a batch has its shapes, and nothing is decoded."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from datamodules.batch import Batch, Modality
from datamodules.collate import collate
from datamodules.content import Media
from datamodules.conversation import Sample
from datamodules.dataset import MultiModalDataset
from datamodules.media import Decoded
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip
from datamodules.row_dataset import RowDataset, RowKey


class BlankRows(MultiModalDataset):
    """The rows of a dataset, without its augmentation, caches and reward criteria.

    Args:
        source: The dataset.
    """

    def __init__(self, source: MultiModalDataset) -> None:
        vars(self).update(vars(source) | {"augment": {}, "cached": None})
        self.judge = source.judge if source.judge is not None and source.judge.builds else None

    def decode_medium(self, medium: Media, sample: Sample, key: RowKey | None = None, place: int = 0) -> tuple[str, Decoded]:
        """A blank medium of the right shape."""
        transform = self.processor.encoders[medium.modality].transform
        return f"{medium}", blank(medium.modality, self.shape(medium, sample), transform)


def blank(modality: Modality, shape: tuple[int, ...], transform: Any) -> Decoded:
    """A medium of this shape, as a decoder would give it: a black picture, a black clip, silence.

    Args:
        modality: Its kind.
        shape: As `media_shape` tells it.
        transform: That of its encoder, which says at which rate sound is heard.
    """
    if modality == "image":
        height, width = shape
        return Image.new("RGB", (width, height))
    if modality == "video":
        return Clip(np.zeros((*shape, 3), np.uint8), np.arange(shape[0], dtype=np.float64))
    return Waveform(np.zeros(shape, np.float32), transform.sample_rate)


def blank_batch(dataset: RowDataset, keys: Sequence[RowKey]) -> Batch:
    """The batch of these rows, with blank media; rows that cannot be used are left out of it, as in training."""
    blanks = [BlankRows(copy.copy(source)) for source in dataset.sources]
    items = []
    for key in keys:
        row = key.row
        for source in blanks:
            if row < len(source):
                items += source.__getitems__([key._replace(row=row)])
                break
            row -= len(source)
    return collate(items, dataset.processor.pad_id)
