"""The coded frames of a video, as its container lists them; none is decoded.

Shape suffixes: F frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datamodules.sources import MediaError
from datamodules.video_file import VideoFile

if TYPE_CHECKING:
    from av.packet import Packet

TOLERANCE = 1e-6
"""In seconds; times are fractions, which floating-point numbers only come near to."""


@dataclass(frozen=True)
class Packets:
    """When the frames of a video are shown.

    Args:
        times_F: In seconds from the first one, in this order.
        end: When the last one ends, in seconds from the first one.
        end_of_all: When the last packet of any stream ends, sound included, in seconds from the first frame.
        are_groups_closed: Whether each frame needs only what follows the last keyframe before it, and none is hidden by an
            edit list: a decoder may start at any keyframe, and count from there.
    """

    times_F: NDArray[np.float64]
    end: float
    end_of_all: float
    are_groups_closed: bool

    def shown_at(self, times: Sequence[float]) -> NDArray[np.int64]:
        """Numbers, from 0, of the frames that are shown at these times."""
        return np.maximum(np.searchsorted(self.times_F, np.asarray(times) + TOLERANCE, side="right") - 1, 0)


def read_packets(video: VideoFile, start: float) -> Packets:
    """Reads through a video without decoding it.

    Args:
        video: The file.
        start: The container's time at which the first frame is shown, in seconds.

    Raises:
        MediaError: It holds no frames, or cannot be read.
    """
    shown: list[int] = []
    end, end_of_all, keyframe, are_closed = 0, 0.0, None, True
    with video.open() as (container, stream):
        unit = float(stream.time_base or 0)
        for packet in container.demux():
            ticks = display_ticks(packet)
            stop = None if ticks is None else ticks + (packet.duration or 0)
            end_of_all = max(end_of_all, 0.0 if stop is None else float(stop * packet.time_base) - start)
            if packet.stream_index != stream.index:
                continue
            if ticks is None or stop is None:  # the mark of the end; nothing is known of a frame without a time
                are_closed &= packet.size == 0
                continue
            keyframe = ticks if packet.is_keyframe else keyframe
            are_closed &= keyframe is not None and ticks >= keyframe and not packet.is_discard
            if not packet.is_discard:
                shown.append(ticks)
                end = max(end, stop)
    if not shown:
        raise MediaError(f"{video.name} holds no frames")
    times_F = np.sort(np.asarray(shown, dtype=np.float64)) * unit - start
    return Packets(times_F, max(end * unit - start, float(times_F[-1])), end_of_all, are_closed)


def display_ticks(packet: "Packet") -> int | None:
    """When a coded frame is shown, in units of its stream's time base; AVI knows only when it is decoded."""
    return packet.dts if packet.pts is None else packet.pts


def check_end(video: VideoFile, time: float, seconds: float, end: float) -> None:
    """Refuses a file that ends before its header says: its last frame would stand for all that is missing.

    Args:
        video: The file.
        time: The last one at which something is wanted.
        seconds: Length of the file by its header.
        end: When the file ends, all in seconds; headers may be off by a tenth of the length, but by half a second at most.

    Raises:
        MediaError: Nothing is there at that time.
    """
    if time > end + min(0.1 * seconds, 0.5):
        raise MediaError(
            f"{video.name} ends after {end:.2f} seconds, but its header says {seconds:.2f}: it is truncated or damaged"
        )
