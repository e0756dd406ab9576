"""One door to the media of all kinds: what a row names becomes an image, a clip or a waveform."""

import random
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from datamodules.call import Call, call_here
from datamodules.content import Media
from datamodules.media_audio import AudioLimits, Waveform, decode_audio, probe_audio
from datamodules.media_image import ImageLimits, decode_image, probe_image
from datamodules.media_video import Clip, VideoLimits, decode_video, medium_name, probe_clip
from datamodules.sandbox import Isolated
from datamodules.sources import MediaRoot, content_key

Decoded = Image.Image | Clip | Waveform


@dataclass(frozen=True)
class MediaLimits:
    """How big a medium may be, before it is decoded, and what reading it may take.

    Args:
        image: Of images.
        video: Of videos, and which library reads them.
        audio: Of sounds, and of the sound tracks of videos.
        isolate: Decode in a process of its own, beside each loader worker, so that a medium that crashes, hangs or fills its
            decoder costs its row and not the run. What is decoded is the same, bit for bit, without it, but neither time nor
            memory is limited then: for media that are trusted, and for looking into a decoder with a debugger or profiler.
    """

    image: ImageLimits = field(default_factory=ImageLimits)
    video: VideoLimits = field(default_factory=VideoLimits)
    audio: AudioLimits = field(default_factory=AudioLimits)
    isolate: bool = True

    def call(self, medium: Media) -> Call:
        """How the functions that read a medium are called."""
        if not self.isolate:
            return call_here
        own: ImageLimits | VideoLimits | AudioLimits
        match medium.modality:
            case "image":
                own = self.image
            case "video":
                own = self.video
            case "audio":
                own = self.audio
        return Isolated(medium_name(medium), f"limits.{medium.modality}", own.max_decode_seconds, own.max_memory_bytes)


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
    call = limits.call(medium)
    match medium.modality:
        case "image":
            return call(decode_image, medium.files[0], media_root, limits.image)
        case "video":
            return decode_video(medium, media_root, limits.video, transform.sampling, generator, call)
        case "audio":
            rate, least = transform.sample_rate, transform.min_samples
            return decode_audio(medium.files[0], media_root, limits.audio, rate, least, medium.start, medium.end, call)


def probe(medium: Media, media_root: MediaRoot, limits: MediaLimits, transform: Any) -> tuple[int, ...]:
    """The shape that `decode` gives, from the header of the file alone: (H, W), (F, H, W) or (S,).

    Args:
        medium: What the row names.
        media_root: The folder that paths are below.
        limits: How big it may be.
        transform: The encoder's.

    Raises:
        MediaError: The source cannot be used, or its header cannot be read.
    """
    call = limits.call(medium)
    match medium.modality:
        case "image":
            return call(probe_image, medium.files[0], media_root, limits.image)
        case "video":
            return probe_clip(medium, media_root, limits.video, transform.sampling, call)
        case "audio":
            header = call(probe_audio, medium.files[0], media_root, limits.audio, medium.start, medium.end)
            return header.shape(transform.sample_rate, transform.min_samples)


def media_key(medium: Media, media_root: MediaRoot, transform: Any) -> str:
    """A cheap key, the same for two media where `decode` gives the same of them.

    Args:
        medium: What the row names.
        media_root: The folder that paths are below.
        transform: The encoder's.

    Raises:
        MediaError: A file cannot be found.
    """
    files = "|".join(content_key(file, media_root) for file in medium.files)
    match medium.modality:
        case "image":
            return files
        case "video":
            return f"{files}[{medium.start}:{medium.end}] at {medium.fps} fps, {transform.sampling}"
        case "audio":
            return f"{files}[{medium.start}:{medium.end}] at {transform.sample_rate} Hz"
