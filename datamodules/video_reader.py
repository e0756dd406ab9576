"""What a library that reads videos has to do. Shape suffixes: F frames, H height, W width."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.video_file import VideoFile
from datamodules.video_header import VideoHeader

Library = Literal["decord", "pyav"]

Frames = tuple[NDArray[np.uint8], NDArray[np.float64]]
"""frames_FHW3, RGB and upright, and times_F, since when each is shown, in seconds from the first frame of the file."""


class VideoReader(Protocol):
    """A way to the frames of a video: opens the file, takes what is wanted, and closes it again.

    A file that stayed open would hang the processes that are forked while it is.
    """

    def __call__(self, video: VideoFile, header: VideoHeader, times: Sequence[float]) -> Frames:
        """Reads the frames that are shown at `times`.

        Args:
            video: The file.
            header: Its header.
            times: In seconds from the first frame, in order.

        Raises:
            MediaError: They cannot be decoded.
        """
