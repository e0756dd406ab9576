"""Size and orientation of a JPEG from its markers: planning asks nothing else of a file, and Pillow makes a picture first.

Only what is ordinary is read here, as Pillow reads it. Of whatever else a file holds it says nothing, and Pillow decides.
"""

import os
import struct
from typing import BinaryIO, NamedTuple

_HEAD = struct.Struct(">HH")
_DQT, _SOS, _APP1 = 0xFFDB, 0xFFDA, 0xFFE1

_FRAMES = frozenset({0xFFC0, 0xFFC1, 0xFFC2})
"""SOF0 to SOF2, with Huffman coding: baseline, extended and progressive (ITU-T T.81, table B.1)."""

_LEAST_BYTES = {
    **dict.fromkeys(_FRAMES, 9),
    0xFFC4: 0,  # DHT
    _SOS: 0,
    _DQT: 65,
    0xFFDD: 0,  # DRI
    0xFFE0: 7,  # up to the version of JFIF
    _APP1: 0,
    0xFFE2: 14,  # up to the numbers of a part of an ICC profile
    **dict.fromkeys(range(0xFFE3, 0xFFED), 0),
    0xFFEE: 7,  # up to Adobe's version
    0xFFEF: 0,
    0xFFFE: 0,  # COM
}
"""The segments that are read here, and how much of each Pillow needs. Not APP13: Photoshop's resources may be damaged."""

_READ = _FRAMES | {_DQT, _APP1}
_READ_BYTES = 4096
"""How much of a segment is looked at; the rest of the 64 KB that Exif may have is mostly a small picture."""

_EXIF = b"Exif\0\0"

_ORIENTATION, _X_RESOLUTION = 0x0112, 0x011A
_SHORT, _RATIONAL = 3, 5
_VALUE_BYTES = {1: 1, 2: 1, _SHORT: 2, 4: 4, _RATIONAL: 8, 7: 1, 9: 4, 10: 8}
"""By the types of Exif 2.3, 4.6.2."""


class ImageHeader(NamedTuple):
    """What is planned with.

    Args:
        width: In pixels, as stored.
        height: In pixels, as stored.
        orientation: Of Exif, 1 (upright) to 8.
    """

    width: int
    height: int
    orientation: int


def read_jpeg_header(file: BinaryIO) -> ImageHeader | None:
    """Reads the segments of a file up to its first scan (ITU-T T.81, B.1.1 and B.2), without the pixels.

    Args:
        file: At its start.

    Returns:
        None where it is no JPEG, is cut off before its first scan, or holds anything out of the ordinary: fill bytes, markers
        without a length, arithmetic or lossless coding, 12 bits, two frames, two Exif segments, resources of Photoshop.
    """
    if file.read(2) != b"\xff\xd8":
        return None
    size: tuple[int, int] | None = None
    orientation: int | None = None
    while len(head := file.read(4)) == 4:
        marker, length = _HEAD.unpack(head)
        num_bytes = length - 2  # the length counts itself
        if marker not in _LEAST_BYTES or num_bytes < _LEAST_BYTES[marker]:
            return None
        if marker == _SOS:
            is_whole = len(file.read(num_bytes)) == num_bytes
            return ImageHeader(*size, orientation or 1) if size is not None and is_whole else None
        data = file.read(min(num_bytes, _READ_BYTES)) if marker in _READ else b""
        is_plain = True
        if marker in _FRAMES:
            is_plain = size is None and (size := _frame_size(data)) is not None
        elif marker == _DQT:
            is_plain = len(data) == num_bytes and num_bytes % 65 == 0 and max(data[::65]) < 16  # whole ones of 8 bits, B.2.4.1
        elif data.startswith(_EXIF):
            is_plain = orientation is None and (orientation := _exif_orientation(data, num_bytes)) is not None
        if not is_plain:
            return None
        file.seek(num_bytes - len(data), os.SEEK_CUR)  # may lead beyond the end, where no scan is found
    return None


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """Width and height of a frame of 8 bits and 1, 3 or 4 components (ITU-T T.81, B.2.2)."""
    num_components = frame[5] if len(frame) > 5 else 0
    if num_components not in (1, 3, 4) or len(frame) != 6 + 3 * num_components or frame[0] != 8:
        return None
    height, width = _HEAD.unpack_from(frame, 1)
    return (width, height) if width and height else None


def _exif_orientation(data: bytes, num_bytes: int) -> int | None:
    """Orientation that the 0th directory of Exif gives, 1 where it gives none (Exif 2.3, 4.6.2 and 4.6.4, tag 0x0112).

    Args:
        data: The segment, or as much of it as is needed.
        num_bytes: Of the whole segment.

    Returns:
        None where an entry is odd: Pillow stops at one whose value lies beyond the segment, and reads other types too.
    """
    tiff = data[len(_EXIF) :]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return None
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start + 2 > len(tiff):
        return None
    (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)
    end = start + 2 + 12 * num_entries
    if end > len(tiff):
        return None
    orientation = 1
    for tag, kind, num_values, value in struct.iter_unpack(f"{order}HHII", tiff[start + 2 : end]):
        num_value_bytes = num_values * _VALUE_BYTES.get(kind, 1 << 32)
        if num_value_bytes > 4 and value + num_value_bytes > num_bytes - len(_EXIF):
            return None
        if tag == _ORIENTATION:
            if (kind, num_values) != (_SHORT, 1):
                return None
            orientation = value & 0xFFFF if order == "<" else value >> 16  # it stands first in its field
        elif tag == _X_RESOLUTION and (kind, num_values) != (_RATIONAL, 1):  # which Pillow computes with
            return None
    return orientation if 1 <= orientation <= 8 else 1
