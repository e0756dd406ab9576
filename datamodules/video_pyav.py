"""Frames by PyAV. Shape suffixes: F frames, H height, W width."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datamodules.sources import MediaError
from datamodules.video_file import VideoFile
from datamodules.video_header import VideoHeader
from datamodules.video_packets import TOLERANCE, check_end, display_ticks, read_packets
from datamodules.video_reader import Frames

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

UNTIMED = ("avi", "mpeg")
"""Containers that do not say of each frame when it is shown."""


def read_by_pyav(video: VideoFile, header: VideoHeader, times: Sequence[float]) -> Frames:
    """Reads frames by PyAV; see `VideoReader`.

    It jumps wherever a keyframe lies between a frame and the next one wanted. In AVI and MPEG program streams it counts the
    frames from the first one instead.
    """
    if video.container in UNTIMED:
        return _count(video, header, times)
    pixels: list[NDArray[np.uint8]] = []
    shown: list[float] = []
    with video.open() as (container, stream):
        unit = float(stream.time_base or 0)
        place = _Place(video, container, stream, first=round(header.start / unit))
        before: VideoFrame | None = None
        for time in times:
            frame = place.frame_at(math.floor((header.start + time + TOLERANCE) / unit))
            shown.append(time_of(frame, video) * unit - header.start)
            if place.after is None:
                check_end(video, time, header.seconds, shown[-1] + (frame.duration or 0) * unit)
            pixels.append(pixels[-1] if frame is before else _pixels(frame, video, header))
            before = frame
    return np.stack(pixels), np.asarray(shown)


def _count(video: VideoFile, header: VideoHeader, times: Sequence[float]) -> Frames:
    packets = read_packets(video, header.start)
    check_end(video, times[-1], header.seconds, packets.end)
    numbers_F = packets.shown_at(times)
    wanted = set(numbers_F.tolist())
    kept: dict[int, NDArray[np.uint8]] = {}
    with video.open() as (container, stream):
        for number, frame in enumerate(_whole(container.decode(stream), video)):
            if number in wanted:
                kept[number] = _pixels(frame, video, header)
            if len(kept) == len(wanted):
                break
    if len(kept) < len(wanted):
        raise MediaError(f"{video.name} is truncated or damaged: it holds fewer frames than it says")
    return np.stack([kept[number] for number in numbers_F.tolist()]), packets.times_F[numbers_F]


class _Place:
    """A place in a video that is being decoded: the frame that is shown there, and the one after it.

    Args:
        video: The file.
        container: The same, opened.
        stream: Its video.
        first: When the first frame is shown, in units of the stream's time base, like all times here.
    """

    def __init__(self, video: VideoFile, container: "InputContainer", stream: "VideoStream", first: int) -> None:
        self.video, self.container, self.stream, self.first = video, container, stream, first
        self.second = max(1, round(1 / (stream.time_base or 1)))
        self.frames: Iterator[VideoFrame] = iter(())
        self.shown: VideoFrame | None = None
        self.after: VideoFrame | None = None

    def frame_at(self, time: int) -> "VideoFrame":
        """The frame that is shown at a time, not before that of the last call.

        Raises:
            MediaError: There is none, or it is damaged.
        """
        if self._is_jump_worth(time):
            self._jump(time)
        while self.after is not None and (self.shown is None or time_of(self.after, self.video) <= time):
            self.shown, self.after = self.after, next(self.frames, None)
        if self.shown is None or time_of(self.shown, self.video) > time + self.second:
            at = (time - self.first) / self.second
            raise MediaError(f"{self.video.name} is truncated or damaged: no frame can be decoded at {at:.2f} seconds")
        return self.shown

    def _is_jump_worth(self, time: int) -> bool:
        if self.after is None:
            return self.shown is None
        if time < time_of(self.after, self.video):
            return False
        entry = self.stream.index_entries.search_timestamp(time)
        return entry < 0 or self.stream.index_entries[entry].timestamp > time_of(self.after, self.video)

    def _jump(self, time: int) -> None:
        """Starts to decode at the last keyframe that is shown before a time.

        An index may hold the times at which frames are decoded, which are earlier, and so lead to a keyframe shown after it.
        """
        import av

        earlier = [max(time - seconds * self.second, self.first) for seconds in (0, 1, 4, 16, 64)]
        for goal in (*earlier, self.first, 0):
            try:
                self.container.seek(goal, stream=self.stream)
            except av.FFmpegError:  # some containers know no place before the first one in their index
                continue
            packets = self.container.demux(self.stream)
            keyframe = next((packet for packet in packets if packet.is_keyframe), None)
            ticks = None if keyframe is None else display_ticks(keyframe)
            if keyframe is None or ticks is None:
                continue
            self.frames = _whole(_since(ticks, chain([keyframe], packets), self.video), self.video)
            if ticks <= time:
                break
        self.shown, self.after = None, next(self.frames, None)


def _since(ticks: int, packets: "Iterable[Packet]", video: VideoFile) -> "Iterator[VideoFrame]":
    """Frames from a keyframe on; those that are shown before it need others, from before the jump."""
    for packet in packets:
        yield from (frame for frame in packet.decode() if time_of(frame, video) >= ticks)


def time_of(frame: "VideoFrame", video: VideoFile) -> int:
    """Since when a frame is shown."""
    if frame.pts is None:
        raise MediaError(f"{video.name} does not say when some of its frames are shown: write it again, as MP4")
    return frame.pts


def _whole(frames: "Iterable[VideoFrame]", video: VideoFile) -> "Iterator[VideoFrame]":
    """The frames, as long as none is damaged: those after it need it, and would be wrong without a mark."""
    for frame in frames:
        if frame.is_corrupt:
            raise MediaError(f"{video.name} is damaged: a frame in it cannot be decoded whole")
        yield frame


def _pixels(frame: "VideoFrame", video: VideoFile, header: VideoHeader) -> NDArray[np.uint8]:
    """A decoded frame as pixels_HW3, upright."""
    # FFmpeg would convert by threads, which a frame keeps: in a worker that was forked meanwhile, its end would wait for them
    pixels_HW3 = np.rot90(frame.to_ndarray(format="rgb24", threads=1).astype(np.uint8, copy=False), header.turns)
    if pixels_HW3.shape[:2] != (header.height, header.width):
        raise MediaError(
            f"{video.name} has a frame of {pixels_HW3.shape[0]} x {pixels_HW3.shape[1]} pixels, but its header says "
            f"{header.height} x {header.width}: encode it again with frames of one size"
        )
    return pixels_HW3
