"""The media of a row, corrupted as its objective wants them: drawn from the seed and the row, the same in each epoch."""

import contextlib
import random
from typing import TYPE_CHECKING

from datamodules.augment import rng
from datamodules.batch import RowError
from datamodules.content import Media
from datamodules.conversation import Sample
from datamodules.media import Decoded

if TYPE_CHECKING:
    from datamodules.dataset import MultiModalDataset

_TRIES = 20
"""Rows that are drawn in search of another medium."""


def corrupt_medium(
    dataset: "MultiModalDataset", medium: Media, found: tuple[str, Decoded], sample: Sample, row: int, place: int
) -> tuple[str, Decoded]:
    """A medium of the chosen side of a row, corrupted, with a key of its content.

    Args:
        dataset: The rows.
        medium: Which one.
        found: The medium with its key.
        sample: The row.
        row: Its number.
        place: That of the medium among those of its modality.

    Raises:
        RowError: It is to be exchanged for that of another row, and there is none.
    """
    content, decoded = found
    line, corruption = dataset.rows[row], dataset.answer_form.corruption
    generator = rng(dataset.seed, 0, line, place, stage=2)
    if medium.modality == "image" and corruption.image == "other":
        wrong = _other(dataset, medium, sample, generator)
    else:
        wrong = corruption(decoded, generator)
    return f"{content}~{dataset.name}.{dataset.seed}.{line}.{place}", wrong


def _other(dataset: "MultiModalDataset", medium: Media, sample: Sample, generator: random.Random) -> Decoded:
    """A medium of the same kind from another row, drawn at random."""
    for _ in range(_TRIES):
        row = generator.randrange(len(dataset))
        with contextlib.suppress(RowError):  # one of many: its own turn names it
            others = [other for other in dataset.sample(row).media(medium.modality) if other != medium]
            if others:
                return dataset.decode_medium(others[0], sample)[1]
    raise RowError(sample.origin, f"none of {_TRIES} rows drawn at random has another {medium.modality} to corrupt this one with")
