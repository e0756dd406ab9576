"""Videos."""

from typing import Any

from datamodules.augment_video import VideoAugment
from datamodules.base import MultiModalDataModule


class VideoDataModule(MultiModalDataModule):
    """Rows with videos: files, or lists of image files, the whole or a part from `start` to `end` (and rows without).

    Args:
        augment: Random augmentation of training clips; None: none.
    """

    def __init__(self, *args: Any, augment: VideoAugment | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if augment is not None:
            self.augment["video"] = augment
