"""How a video has to be turned to stand upright, from the boxes of its header: libraries tell it of decoded frames only."""

import io
import math
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAX_BOXES = 10_000
"""Most boxes looked at in a row: a damaged file may seem to hold millions."""


class Box(NamedTuple):
    """A piece of a file: its kind, and the bytes in it from `start` to `end`."""

    kind: bytes
    start: int
    end: int


def quarter_turns(file: BinaryIO, container: str) -> int | None:
    """Quarter turns against the clock, 0 to 3, that make the frames upright; None: they are stored mirrored.

    An angle that is no multiple of 90 degrees is left as it is, as players do.

    Args:
        file: The file.
        container: `mov` (MP4, QuickTime) and `matroska` (Matroska, WebM) may say it; others cannot.
    """
    end = file.seek(0, io.SEEK_END)
    try:
        match container:
            case "mov":
                degrees = _mov_degrees(file, end)
            case "matroska":
                degrees = _matroska_degrees(file, end)
            case _:
                degrees = 0.0
    except struct.error:  # cut off: whoever decodes it says so
        degrees = 0.0
    if degrees is None:
        return None
    turns = round(degrees / 90)
    return turns % 4 if abs(degrees - 90 * turns) < 1 else 0


def _mov_degrees(file: BinaryIO, end: int) -> float | None:
    """Angle of the first video track's matrix, times that of the movie (ISO/IEC 14496-12, 8.2.2 and 8.3.2)."""
    for movie in _boxes(file, 0, end, b"moov"):
        movie_degrees = [_matrix_degrees(file, box, 36) for box in _boxes(file, movie.start, movie.end, b"mvhd")]
        for track in _boxes(file, movie.start, movie.end, b"trak"):
            kinds = [
                _read(file, handler.start + 8, 4)
                for media in _boxes(file, track.start, track.end, b"mdia")
                for handler in _boxes(file, media.start, media.end, b"hdlr")
            ]
            if kinds == [b"vide"]:
                own = [_matrix_degrees(file, box, 40) for box in _boxes(file, track.start, track.end, b"tkhd")]
                angles = [angle for angle in movie_degrees + own if angle is not None]
                return sum(angles) if len(angles) == len(movie_degrees + own) else None
    return 0.0


def _matrix_degrees(file: BinaryIO, box: Box, offset: int) -> float | None:
    """Angle against the clock of the matrix of a header box; None: it mirrors.

    The matrix is (a b u; c d v; x y w) in 16.16 fixed point, and (x, y) is shown at (ax + cy, bx + dy), y down. It stands
    `offset` bytes into the box; in version 1 times before it have 64 bits.
    """
    version = _read(file, box.start, 1)
    late = {b"\0": 0, b"\1": 12}.get(version, 0)
    a, b, _, c, d = struct.unpack(">5i", _read(file, box.start + offset + late, 20))
    if a * d - b * c < 0:
        return None
    return -math.degrees(math.atan2(b, a))


def _boxes(file: BinaryIO, start: int, end: int, kind: bytes) -> Iterator[Box]:
    """The boxes of a kind from `start` to `end`."""
    for _ in range(MAX_BOXES):
        if start + 8 > end:
            return
        size, found = struct.unpack(">I4s", _read(file, start, 8))
        head = 8
        if size == 1:
            size, head = struct.unpack(">Q", _read(file, start + 8, 8))[0], 16
        size = end - start if size == 0 else size
        if size < head:
            return
        if found == kind:
            yield Box(found, start + head, min(start + size, end))
        start += size


_SEGMENT, _TRACKS, _TRACK, _VIDEO = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
_CLUSTER, _PROJECTION, _ROLL = b"\x1f\x43\xb6\x75", b"\x76\x70", b"\x76\x75"


def _matroska_degrees(file: BinaryIO, end: int) -> float:
    """ProjectionPoseRoll of the first video track (RFC 9559), which counts against the clock."""
    found = [Box(b"", 0, end)]
    for kind in (_SEGMENT, _TRACKS, _TRACK, _VIDEO, _PROJECTION, _ROLL):
        found = [box for parent in found for box in _elements(file, parent) if box.kind == kind]
        if kind == _VIDEO:
            found = found[:1]
    if not found:
        return 0.0
    data = _read(file, found[0].start, min(8, found[0].end - found[0].start))
    return float(struct.unpack(">f" if len(data) == 4 else ">d", data)[0])


def _elements(file: BinaryIO, parent: Box) -> Iterator[Box]:
    """The EBML elements in another one (RFC 8794), up to the first cluster of frames."""
    start = parent.start
    for _ in range(MAX_BOXES):
        if start >= parent.end:
            return
        kind, start = _variable(file, start)
        size_bytes, start = _variable(file, start)
        size = int.from_bytes(size_bytes, "big") - (1 << 7 * len(size_bytes))
        if kind == _CLUSTER:
            return
        is_unknown = size == (1 << 7 * len(size_bytes)) - 1
        end = parent.end if is_unknown else min(start + size, parent.end)
        yield Box(kind, start, end)
        start = end


def _variable(file: BinaryIO, start: int) -> tuple[bytes, int]:
    """The bytes of a number whose leading zero bits give its length, and where it ends."""
    first = _read(file, start, 1)[0]
    if first == 0:
        raise struct.error(f"there is no number at byte {start}")
    length = 9 - first.bit_length()
    return _read(file, start, length), start + length


def _read(file: BinaryIO, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise struct.error(f"{num_bytes} bytes at {start} lie beyond the end of the file")
    return data
