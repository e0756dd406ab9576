"""Sound."""

from typing import Any

from datamodules.augment_audio import AudioAugment
from datamodules.base import MultiModalDataModule


class AudioDataModule(MultiModalDataModule):
    """Rows with sound: files of sound, and the sound tracks of videos (and rows without).

    Args:
        augment: Random augmentation of training sounds; None: none.
    """

    def __init__(self, *args: Any, augment: AudioAugment | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if augment is not None:
            self.augment["audio"] = augment
