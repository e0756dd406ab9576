"""What a video says of itself before a frame is decoded."""

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.sources import MediaError, as_file
from datamodules.video_file import VideoFile
from datamodules.video_packets import check_end, display_ticks, read_packets
from datamodules.video_turn import quarter_turns

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video without decoding it.

    Args:
        seconds: Its length.
        fps: Frames a second, on average; 0 where the container does not say.
        height: Of the upright frames, in pixels.
        width: Of the upright frames, in pixels.
        num_frames: As the container counts them; None where it does not.
        codec: The coding of the frames, by FFmpeg's name; empty where the video is a list of image files.
        turns: Quarter turns against the clock that make the stored frames upright.
        start: The container's time at which the first frame is shown, in seconds; all times of ours count from there.
    """

    seconds: float
    fps: float
    height: int
    width: int
    num_frames: int | None
    codec: str = ""
    turns: int = 0
    start: float = 0.0


def read_header(video: VideoFile) -> VideoHeader:
    """Reads the header of a video; where that does not say how long the frames last, all of the file, without decoding it.

    Raises:
        MediaError: It is no video, or its header cannot be read.
    """
    with as_file(video.found, video.name) as file:
        turns = quarter_turns(file, video.container)
        num_bytes = file.seek(0, io.SEEK_END)
    if turns is None:
        raise MediaError(f"{video.name} asks to be shown mirrored, which is not done here: encode it again as it should look")
    with video.open(for_header=True) as (container, stream):
        first = next((packet for packet in container.demux(stream) if packet.size), None)
        if first is None:
            raise MediaError(f"{video.name} holds no frames")
        start = _start(stream, first)
        seconds, claim = _seconds(stream, start), _claim(container, start)
        if seconds is None and len(container.streams) == 1:
            seconds = claim
        height, width = stream.codec_context.height, stream.codec_context.width
        codec, rate, num_frames = stream.codec_context.codec.canonical_name, stream.average_rate, stream.frames
    if num_frames > num_bytes:  # a reader would make room for all of them
        raise MediaError(f"{video.name} is damaged: it says that it has {num_frames:,} frames, and has {num_bytes:,} bytes")
    if not height or not width:
        raise MediaError(f"{video.name} does not say how large its frames are: it is damaged")
    if seconds is None:
        packets = read_packets(video, start)
        check_end(video, claim or 0.0, claim or 0.0, packets.end_of_all)
        seconds = packets.end
    return VideoHeader(
        seconds=seconds,
        fps=float(rate or 0),
        height=width if turns % 2 else height,
        width=height if turns % 2 else width,
        num_frames=num_frames or None,
        codec=codec,
        turns=turns,
        start=start,
    )


def _start(stream: "VideoStream", first: "Packet") -> float:
    """When the first frame is shown: an edit list may hide packets before it, and AVI leaves out the decoder's delay."""
    ticks = [value for value in (stream.start_time, display_ticks(first)) if value is not None]
    return float(max(ticks, default=0) * (stream.time_base or 0))


def _seconds(stream: "VideoStream", start: float) -> float | None:
    """How long the frames last, by the header; None where that does not say."""
    if stream.duration is not None and stream.duration > 0:
        return float(stream.duration * (stream.time_base or 0))
    # in Matroska a tag, which may end in a language
    tags = (re.match(r"(\d+):(\d+):([\d.]+)$", value) for key, value in stream.metadata.items() if key.startswith("DURATION"))
    tag = next(filter(None, tags), None)
    return None if tag is None else 3600 * int(tag[1]) + 60 * int(tag[2]) + float(tag[3]) - start


def _claim(container: "InputContainer", start: float) -> float | None:
    """How long the longest stream is, by the header; None where that does not say."""
    # these two count from 0, the others from the first time stamp
    offset = start if container.format.name in ("matroska,webm", "flv") else 0.0
    seconds = (container.duration or 0) / 1e6 - offset
    return seconds if seconds > 0 else None
