"""Images."""

from typing import Any

from datamodules.augment import ImageAugment
from datamodules.base import MultiModalDataModule


class ImageDataModule(MultiModalDataModule):
    """Rows with images (and rows without).

    Args:
        augment: Random augmentation of training images; None: none.
    """

    def __init__(self, *args: Any, augment: ImageAugment | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if augment is not None:
            self.augment["image"] = augment
