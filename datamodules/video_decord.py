"""Frames by decord. Shape suffixes: F frames, H height, W width."""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.sources import MediaError
from datamodules.video_file import VideoFile
from datamodules.video_header import VideoHeader
from datamodules.video_packets import check_end, read_packets
from datamodules.video_reader import Frames

UNREADABLE = ("gif", "mpegts")
"""Containers of which decord gives no frames, or others than it says."""


def check_decord() -> None:
    """Refuses to go on without decord, which is no fault of the video.

    Raises:
        ValueError: It is not installed.
    """
    if find_spec("decord") is None:
        raise ValueError(
            "data.limits.video.reader is decord, which is not installed (it has wheels for Linux on x86-64): install it, or set "
            "data.limits.video.reader to pyav"
        )


def read_by_decord(video: VideoFile, header: VideoHeader, times: Sequence[float]) -> Frames:
    """Reads frames by decord; see `VideoReader`.

    decord finds frames by number. After a jump it miscounts wherever a frame needs one from before the last keyframe (open
    groups of pictures, which x265 makes by default), where an edit list hides frames, and in containers without a precise
    index; and it waits forever for a frame that a file promises but does not hold. So the packets are looked at first, and
    it jumps only where none of this is so; elsewhere all frames up to the last one wanted are decoded.
    """
    if header.codec == "av1" or video.container in UNREADABLE:
        what = "AV1" if header.codec == "av1" else video.container
        raise MediaError(f"{video.name} is {what}, which decord does not read: set data.limits.video.reader to pyav")
    import decord

    packets = read_packets(video, header.start)
    check_end(video, times[-1], header.seconds, packets.end)
    numbers_F = packets.shown_at(times)
    decord.logging.set_level(decord.logging.QUIET)  # what matters of what it prints is raised
    try:
        source = io.BytesIO(video.found) if isinstance(video.found, bytes) else str(video.found)
        opened = decord.VideoReader(source, num_threads=1)  # loader workers are the parallel processes
        may_jump = video.container in ("mov", "matroska") and packets.are_groups_closed
        if may_jump and len(opened) == len(packets.times_F):
            frames_FHW3 = opened.get_batch(numbers_F).asnumpy()
        else:
            frames_FHW3 = _in_order(opened, numbers_F.tolist())
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration) as error:
        reason = (str(error).strip() or "it holds fewer frames than it says").splitlines()[0]
        raise MediaError(f"{video.name} is truncated or damaged (decord: {reason})") from error
    if video.container != "mov":  # those it has turned itself
        frames_FHW3 = np.rot90(frames_FHW3, header.turns, axes=(1, 2))
    return frames_FHW3, packets.times_F[numbers_F]


def _in_order(opened: Any, numbers: list[int]) -> NDArray[np.uint8]:
    """The frames with these numbers, ascending, without a jump."""
    wanted = set(numbers)
    kept: dict[int, NDArray[np.uint8]] = {}
    for number in range(numbers[-1] + 1):
        frame = opened.next()
        if number in wanted:
            kept[number] = frame.asnumpy()
    return np.stack([kept[number] for number in numbers])
