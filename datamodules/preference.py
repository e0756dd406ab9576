"""Rows whose answers are compared, of any media."""

from typing import Any

from datamodules.base import MultiModalDataModule
from datamodules.source import MediaAugment


class PreferenceDataModule(MultiModalDataModule):
    """Rows with chosen and rejected answers, or with feedback, about images, video and sound in one file.

    Every data module serves every objective; this one is for a file of several kinds of media.

    Args:
        augment: Random augmentation of training media, the same for all answers of a row.
    """

    def __init__(self, *args: Any, augment: MediaAugment = MediaAugment(), **kwargs: Any) -> None:  # it is frozen
        super().__init__(*args, **kwargs)
        self.augment = augment.by_modality()
