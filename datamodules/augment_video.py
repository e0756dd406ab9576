"""Random changes of training clips: the same for each of their frames. Shape suffixes: F frames, H height, W width."""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from datamodules.augment import Augment, ImageAugment
from datamodules.media_video import Clip


@dataclass(frozen=True)
class VideoAugment(Augment):
    """Random frames, and a random crop, flip and colour jitter that all frames of a clip share, for training only.

    Args:
        images: The change of the pictures, drawn once for a clip.
        random_frames: Take each frame at a random time in its segment of the clip, instead of in its middle.
        reverse: Probability that a clip is played backwards. Off by default: captions speak of opening and closing.
    """

    images: ImageAugment = field(default_factory=ImageAugment)
    random_frames: bool = True
    reverse: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.reverse <= 1:
            raise ValueError(f"augment.reverse is a probability and must lie in [0, 1], got {self.reverse}")

    @property
    def is_random(self) -> bool:
        """False where every change is off, so that a clip always stays as it is."""
        return self.images.is_random or self.random_frames or self.reverse > 0

    @property
    def draws_frames(self) -> bool:
        """Whether decoding draws the frames of a clip at random."""
        return self.random_frames

    def __call__(self, clip: Clip, generator: random.Random) -> Clip:
        """Changes the clip; its frames get the size of the crop.

        Args:
            clip: It is left as it is.
            generator: From `rng`; the decoder may have drawn the times of the frames from it.
        """
        order = slice(None, None, -1 if generator.random() < self.reverse else 1)
        state, frames = generator.getstate(), []
        for frame_HW3 in clip.frames_FHW3[order]:
            generator.setstate(state)  # each frame draws the same numbers
            frames.append(np.asarray(self.images(Image.fromarray(frame_HW3), generator)))
        return Clip(np.stack(frames), clip.times_F[order])
