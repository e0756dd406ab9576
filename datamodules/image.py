"""Pictures."""

from collections.abc import Sequence
from typing import Any

from datamodules.augment import ImageAugment
from datamodules.base import MultiModalDataModule, Split
from datamodules.dataset import MultiModalDataset
from datamodules.media import ImageLimits


class ImageDataModule(MultiModalDataModule):
    """Rows with pictures (and rows without).

    Args:
        augment: Random augmentation of training pictures; None: none.
        limits: How big a picture may be, before it is decoded.
    """

    def __init__(
        self,
        *args: Any,
        augment: ImageAugment | None = None,
        limits: ImageLimits = ImageLimits(),  # it is frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.augment = augment
        self.limits = limits

    def dataset(self, split: Split, rows: Sequence[int] | None = None) -> MultiModalDataset:
        """The dataset of a split, augmented where it trains."""
        dataset = super().dataset(split, rows)
        dataset.limits = self.limits
        dataset.augment = self.augment if split == "train" else None
        return dataset
