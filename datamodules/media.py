"""One door to the media of all kinds: what a row names becomes an image, a clip or a waveform."""

import random
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from datamodules.content import Media
from datamodules.media_audio import AudioLimits, Waveform
from datamodules.media_image import ImageLimits, decode_image
from datamodules.media_video import Clip, VideoLimits
from datamodules.sources import MediaRoot

Decoded = Image.Image | Clip | Waveform


@dataclass(frozen=True)
class MediaLimits:
    """How big a medium may be, before it is decoded.

    Args:
        image: Of images.
        video: Of videos.
        audio: Of sounds, and of the sound tracks of videos.
    """

    image: ImageLimits = field(default_factory=ImageLimits)
    video: VideoLimits = field(default_factory=VideoLimits)
    audio: AudioLimits = field(default_factory=AudioLimits)


def decode(
    medium: Media, media_root: MediaRoot, limits: MediaLimits, transform: Any, generator: random.Random | None = None
) -> Decoded:
    """Decodes a medium as its encoder wants it.

    Args:
        medium: What the row names.
        media_root: The folder that paths are below.
        limits: How big it may be.
        transform: The encoder's; it says which frames of a video (`sampling`) and which rate of a sound (`sample_rate`).
        generator: Draws the frames of a training clip at random within their segments; None: the middle of each.

    Raises:
        MediaError: The source cannot be used, or cannot be decoded whole.
    """
    match medium.modality:
        case "image":
            return decode_image(medium.source, media_root, limits.image)
        case "video" | "audio":
            raise NotImplementedError(medium.modality)
