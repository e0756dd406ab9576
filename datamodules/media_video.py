"""How a source becomes a clip: frames at given times, without reading what lies between them.

Shape suffixes: F frames, H height, W width.
"""

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from datamodules.call import Call, call_here
from datamodules.content import Media
from datamodules.media_image import ImageLimits, decode_image, probe_image
from datamodules.sources import MediaError, MediaRoot, media_name, resolve, time_span
from datamodules.video_decord import check_decord, read_by_decord
from datamodules.video_file import VideoFile
from datamodules.video_header import VideoHeader, read_header
from datamodules.video_pyav import read_by_pyav
from datamodules.video_reader import Library, VideoReader


@dataclass(frozen=True)
class Clip:
    """The frames of a video that were asked for.

    Args:
        frames_FHW3: RGB, 8 bit, upright.
        times_F: Since when each of them is shown, in seconds from the first frame of the file.
    """

    frames_FHW3: NDArray[np.uint8]
    times_F: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        num_frames, height, width, _ = self.frames_FHW3.shape
        return num_frames, height, width


class Sampling(Protocol):
    """Which frames of a clip an encoder wants."""

    def count(self, seconds: float) -> int:
        """How many frames a clip of this length gives."""

    def times(self, start: float, end: float, generator: random.Random | None = None) -> list[float]:
        """When they are taken, in order, in seconds."""


@dataclass(frozen=True)
class VideoLimits:
    """How big a video may be, raised before its frames are decoded; and which library decodes them.

    Args:
        max_pixels: Height times width of a frame.
        max_bytes: Size of the file, or of what a `data:` URI holds; of a video of image files, of each of them.
        max_seconds: Length of the video.
        max_frames: Frames of the video, of which a decoder makes a table before it gives the first; also of image files.
        max_decode_seconds: How long reading one may take; to be raised where the disk is far away, or videos are so long that
            decord, which decodes from the start where groups of pictures are open, is slow.
        max_memory_bytes: How much memory reading one may take: at least twice what its frames do, 3 bytes a pixel.
        reader: `decord`, or `pyav`, which also reads AV1, GIF and MPEG transport streams, and is quicker where groups of
            pictures are open or files are long. The colours of the two may differ by a few steps of 255. decord decodes ahead,
            so that it is chance whether it refuses a file that is damaged behind the last frame wanted; pyav never does.
    """

    max_pixels: int = 10_000_000
    max_bytes: int = 2_000_000_000
    max_seconds: float = 7200.0
    max_frames: int = 1_000_000
    max_decode_seconds: float = 120.0
    max_memory_bytes: int = 8_000_000_000
    reader: Library = "decord"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "reader" and value <= 0:
                raise ValueError(f"limits.video.{name} must be above 0, got {value}")


def probe_video(medium: Media, media_root: MediaRoot, limits: VideoLimits) -> VideoHeader:
    """Length, frame rate, size and number of frames of a video, from its container, without decoding a frame.

    Of a video of image files, the size is that of the first one.

    Raises:
        MediaError: The source cannot be used, its header cannot be read, or it is over a limit.
    """
    if not isinstance(medium.source, str):
        height, width = probe_image(medium.source[0], media_root, _image_limits(limits))
        num_frames = len(medium.source)
        header = VideoHeader(num_frames / medium.fps, medium.fps, height, width, num_frames)
    else:
        header = read_header(_find(medium.source, media_root, limits))
    _check(header, medium_name(medium), limits)
    return header


def probe_clip(
    medium: Media, media_root: MediaRoot, limits: VideoLimits, sampling: Sampling, call: Call = call_here
) -> tuple[int, int, int]:
    """The shape of the clip that `decode_video` gives, frames, height and width, without decoding a frame.

    Raises:
        MediaError: As `probe_video`; or the row takes a part that lies beyond the video.
    """
    header = call(probe_video, medium, media_root, limits)
    start, end = time_span(medium_name(medium), medium.start, medium.end, header.seconds)
    return sampling.count(end - start), header.height, header.width


def decode_video(
    medium: Media,
    media_root: MediaRoot,
    limits: VideoLimits,
    sampling: Sampling,
    generator: random.Random | None = None,
    call: Call = call_here,
) -> Clip:
    """Decodes the frames of a video that `sampling` wants, and keeps no others.

    Frames are turned upright as their container says. Pixels are taken to be square.

    Args:
        medium: What the row names.
        media_root: The folder that paths are below.
        limits: How big it may be.
        sampling: Which frames are wanted.
        generator: Draws them at random within their segments; None: the middle of each.
        call: Calls what reads the file.

    Raises:
        MediaError: The source cannot be used, or a frame of it cannot be decoded.
    """
    if limits.reader == "decord" and isinstance(medium.source, str):
        check_decord()
    header = call(probe_video, medium, media_root, limits)
    span = time_span(medium_name(medium), medium.start, medium.end, header.seconds)
    return call(read_clip, medium, media_root, limits, header, sampling.times(*span, generator))


def read_clip(medium: Media, media_root: MediaRoot, limits: VideoLimits, header: VideoHeader, times: list[float]) -> Clip:
    """Decodes the frames of a video that are shown at given times, in seconds and in order.

    Raises:
        MediaError: The source cannot be used, or a frame of it cannot be decoded.
    """
    if not isinstance(medium.source, str):
        return _decode_files(medium.source, medium.fps, times, media_root, limits)
    read: VideoReader = read_by_decord if limits.reader == "decord" else read_by_pyav
    clip = Clip(*read(_find(medium.source, media_root, limits), header, times))
    if clip.frames_FHW3.shape != (len(times), header.height, header.width, 3):
        raise MediaError(
            f"{medium_name(medium)} gives frames of shape {clip.frames_FHW3.shape[1:]}, but its header says {header.height} x "
            f"{header.width} pixels: it is damaged, or {limits.reader} cannot read it; try the other data.limits.video.reader"
        )
    return clip


def _find(source: str, media_root: MediaRoot, limits: VideoLimits) -> VideoFile:
    return VideoFile(resolve(source, media_root, "video", limits.max_bytes), media_name(source))


def medium_name(medium: Media) -> str:
    """A medium as errors name it."""
    files = medium.files
    return media_name(files[0]) + (f" and the {len(files) - 1} frames after it" if len(files) > 1 else "")


def _check(header: VideoHeader, name: str, limits: VideoLimits) -> None:
    if header.seconds > limits.max_seconds:
        raise MediaError(f"{name} is {header.seconds:,.1f} seconds long, above limits.video.max_seconds = {limits.max_seconds:g}")
    num_frames = header.num_frames or round(header.fps * header.seconds)
    if num_frames > limits.max_frames:
        raise MediaError(f"{name} has {num_frames:,} frames, above limits.video.max_frames = {limits.max_frames:,}")
    num_pixels = header.height * header.width
    if num_pixels > limits.max_pixels:
        raise MediaError(
            f"{name} is {header.height} x {header.width} = {num_pixels:,} pixels, above limits.video.max_pixels = "
            f"{limits.max_pixels:,}"
        )


def _decode_files(files: tuple[str, ...], fps: float, times: list[float], media_root: MediaRoot, limits: VideoLimits) -> Clip:
    """The clip of a video that is given as its frames, each shown for 1 / fps seconds."""
    numbers = [min(int(time * fps + 1e-6), len(files) - 1) for time in times]
    images = {number: np.asarray(decode_image(files[number], media_root, _image_limits(limits))) for number in set(numbers)}
    first = images[numbers[0]]
    for number, image in images.items():
        if image.shape != first.shape:
            raise MediaError(
                f"{media_name(files[number])} is {image.shape[0]} x {image.shape[1]} pixels, but the frame "
                f"{media_name(files[numbers[0]])} of its video {first.shape[0]} x {first.shape[1]}: the frames must have one size"
            )
    return Clip(np.stack([images[number] for number in numbers]), np.asarray(numbers) / fps)


def _image_limits(limits: VideoLimits) -> ImageLimits:
    return ImageLimits(max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)
