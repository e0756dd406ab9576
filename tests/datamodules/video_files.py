"""Small videos whose frames carry their number, and how to read it back. Shape suffixes: F frames, H height, W width."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH = 48, 80
EVEN = [40 * number for number in range(72)]
"""In milliseconds: 72 frames at 25 a second."""
UNEVEN = np.concatenate([[0], np.cumsum(np.random.default_rng(5).integers(9, 160, 71))]).tolist()
"""In milliseconds: a variable frame rate."""
H264 = {"g": "12", "preset": "veryfast"}
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0"}


def draw(number: int, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """A frame with its number as seven blocks, and a red corner at the top left."""
    pixels = np.full((height, width, 3), 40, np.uint8)
    for bit in range(7):
        if number >> bit & 1:
            pixels[12:36, 10 * bit + 8 : 10 * bit + 18] = 220
    pixels[:8, :8] = (255, 0, 0)
    return pixels


def number_of(pixels: NDArray[np.uint8]) -> int:
    """The number that is drawn on a frame."""
    return sum(int(pixels[18:30, 10 * bit + 10 : 10 * bit + 16].mean() > 130) << bit for bit in range(7))


def corner_of(pixels: NDArray[np.uint8]) -> tuple[bool, bool]:
    """Whether the red corner is at the bottom, and at the right."""
    corners = {(b, r): pixels[-3 if b else 2, -3 if r else 2].astype(int) for b in (False, True) for r in (False, True)}
    return max(corners, key=lambda corner: corners[corner][0] - corners[corner][1])


def write_video(
    path: Path,
    times: Sequence[int] = EVEN,
    codec: str = "libx264",
    options: dict[str, str] = H264,
    unit: Fraction = Fraction(1, 1000),
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    degrees: int = 0,
    container: dict[str, str] | None = None,
) -> Path:
    """Encodes numbered frames, shown at `times` (in `unit` seconds)."""
    import av

    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = size
        stream.pix_fmt, stream.time_base, stream.codec_context.time_base = pix_fmt, unit, unit
        if degrees:
            stream.set_display_rotation(degrees)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(draw(number, *size), format="rgb24")
            frame.pts, frame.time_base = time, unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def hide_first(path: Path, to: Path, num_frames: int) -> Path:
    """An MP4 whose edit list hides its first frames, as an editor that cuts without encoding leaves it."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    length, begin = struct.unpack_from(">Ii", data, at)
    tick = int.from_bytes(data[(place := data.index(b"mdhd") + 16) : place + 4], "big")
    movie_tick = int.from_bytes(data[(place := data.index(b"mvhd") + 16) : place + 4], "big")
    struct.pack_into(">Ii", data, at, length - num_frames * movie_tick // 25, begin + num_frames * tick // 25)
    to.write_bytes(data)
    return to
