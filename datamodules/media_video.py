"""How a source becomes a clip: frames at given times, without reading what lies between them.

Shape suffixes: F frames, H height, W width.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Clip:
    """The frames of a video that were asked for.

    Args:
        frames_FHW3: RGB, 8 bit, upright.
        times_F: When each of them is shown, in seconds from the start of the file.
    """

    frames_FHW3: NDArray[np.uint8]
    times_F: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        num_frames, height, width, _ = self.frames_FHW3.shape
        return num_frames, height, width


@dataclass(frozen=True)
class VideoLimits:
    """How big a video may be; a bigger one is an error, raised before its frames are decoded.

    Args:
        max_pixels: Height times width of a frame.
        max_bytes: Size of the file, or of what a `data:` URI holds.
        max_seconds: Length of the video.
    """

    max_pixels: int = 10_000_000
    max_bytes: int = 2_000_000_000
    max_seconds: float = 7200.0

    def __post_init__(self) -> None:
        for name, value in (("max_pixels", self.max_pixels), ("max_bytes", self.max_bytes), ("max_seconds", self.max_seconds)):
            if value <= 0:
                raise ValueError(f"limits.video.{name} must be above 0, got {value}")
