"""Which frames of a clip are taken: pure functions of its length, which a file's header gives."""

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class FrameSampling:
    """How many frames of a clip are taken, and when.

    The clip is cut into as many segments of one length as frames are taken; each gives the frame in its middle or, for
    training, one at a random time in it (Wang et al. 2016, arXiv 1608.00859). A clip that has fewer frames repeats some.

    Args:
        num_frames: Frames of each clip, however long; it holds where `fps` is None.
        fps: Frames taken a second, so that a longer clip gives more; None: `num_frames`.
        min_frames: Fewest frames that `fps` takes.
        max_frames: Most frames that `fps` takes; of a longer clip they lie further apart.
    """

    num_frames: int = 8
    fps: float | None = None
    min_frames: int = 1
    max_frames: int = 64

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"sampling.num_frames must be at least 1, got {self.num_frames}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"sampling.fps is a number of frames a second, above 0, or null, got {self.fps}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"sampling.min_frames must be at least 1 and at most max_frames, got {self.min_frames} and {self.max_frames}"
            )

    def count(self, seconds: float) -> int:
        """How many frames a clip of this length gives."""
        if self.fps is None:
            return self.num_frames
        return min(max(math.floor(seconds * self.fps + 0.5), self.min_frames), self.max_frames)

    def times(self, start: float, end: float, generator: random.Random | None = None) -> list[float]:
        """When the frames of the clip from `start` to `end` are taken, in order, in seconds.

        Args:
            start: Where the clip starts, in seconds.
            end: Where it ends, in seconds.
            generator: Draws a time in each segment; None: its middle.
        """
        count = self.count(end - start)
        length = (end - start) / count
        return [start + length * (place + (0.5 if generator is None else generator.random())) for place in range(count)]
