"""Files that are broken in every way: a seeded mutator of small good ones."""

import io
import itertools
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.modality import Modality
from tests.datamodules.sound_files import tone, write_container, write_sound
from tests.datamodules.video_files import write_video

FORMATS: dict[str, Modality] = {
    "jpg": "image",
    "png": "image",
    "webp": "image",
    "gif": "image",
    "mp4": "video",
    "avi": "video",
    "wav": "audio",
    "flac": "audio",
    "mp3": "audio",
    "ogg": "audio",
}

ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
"""Numbers at which counts and sizes overflow."""

HEAD = 512
"""Most of what a header says stands in the first bytes of a file, or in the last ones (MP4)."""


@cache
def good(extension: str) -> bytes:
    """A small good file of a format."""
    if FORMATS[extension] == "image":
        pixels_HW3 = np.random.default_rng(2).integers(0, 256, (33, 47, 3), dtype=np.uint8)
        frames = [Image.fromarray(np.roll(pixels_HW3, shift, axis=1)) for shift in range(3)]
        file = io.BytesIO()
        frames[0].save(file, "JPEG" if extension == "jpg" else extension, save_all=extension == "gif", append_images=frames[1:])
        return file.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"good.{extension}"
        match extension:
            case "mp4":
                write_video(path, times=[40 * number for number in range(30)])
            case "avi":
                write_video(path, times=[40 * number for number in range(30)], codec="mpeg4", options={"g": "6"})
            case "wav":
                write_sound(path, tone(6000, 8000, channels=2), 8000, subtype="FLOAT")
            case "mp3":
                write_container(path, tone(16_000, 16_000), 16_000, "mp3", "libmp3lame")
            case _:
                write_sound(path, tone(16_000, 16_000, channels=2), 16_000)
        return path.read_bytes()


def _place(data: bytearray, rng: np.random.Generator) -> int:
    """Somewhere in a file, in its header as often as in all the rest."""
    match rng.integers(4):
        case 0 | 1:
            return int(rng.integers(min(len(data), HEAD)))
        case 2:
            return int(rng.integers(max(0, len(data) - 2 * HEAD), len(data)))
    return int(rng.integers(len(data)))


def truncated(data: bytearray, rng: np.random.Generator) -> None:
    del data[_place(data, rng) :]


def beheaded(data: bytearray, rng: np.random.Generator) -> None:
    del data[: _place(data, rng)]


def flipped(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(rng.choice([1, 3, 10, 100])):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))


def overwritten(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(rng.choice([1, 4])):
        start = _place(data, rng)
        end = min(len(data), start + int(rng.choice([1, 8, 200])))
        data[start:end] = bytes(end - start) if rng.integers(2) else rng.bytes(end - start)


def moved(data: bytearray, rng: np.random.Generator) -> None:
    start, to = _place(data, rng), _place(data, rng)
    block = data[start : start + int(rng.choice([1, 16, 300]))]
    if rng.integers(2):
        del data[start : start + len(block)]
    data[to:to] = block


def absurd(data: bytearray, rng: np.random.Generator) -> None:
    for _ in range(rng.choice([1, 2, 6])):
        order, kind = rng.choice(["<", ">"]), str(rng.choice(["B", "H", "I", "Q"]))
        size = struct.calcsize(kind)
        start = _place(data, rng)
        if start + size <= len(data):
            struct.pack_into(f"{order}{kind}", data, start, int(rng.choice(np.array(ABSURD, dtype=object))) % (1 << 8 * size))


def not_numbers(data: bytearray, rng: np.random.Generator) -> None:
    start = _place(data, rng)
    for place in range(start - start % 4, len(data) - 4, 4 * int(rng.choice([1, 50]))):
        struct.pack_into("<f", data, place, float(rng.choice([float("nan"), float("inf"), 1e30])))


def emptied(data: bytearray, rng: np.random.Generator) -> None:
    data.clear()


def replaced(data: bytearray, rng: np.random.Generator) -> None:
    other = good(str(rng.choice(sorted(FORMATS))))
    data[:] = rng.choice([other, rng.bytes(300), b"<html>404</html>", bytes(data[:16]) + other, bytes(data) + other])


MUTATIONS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    truncated,
    beheaded,
    flipped,
    overwritten,
    moved,
    absurd,
    not_numbers,
    replaced,
    emptied,
)
SHARES = (0.15, 0.04, 0.22, 0.15, 0.12, 0.2, 0.05, 0.06, 0.01)


def sealed_png(data: bytes) -> bytes:
    """A PNG whose checksums are right again, so that what is in its chunks reaches the decoder."""
    sealed, start = data[:8], 8
    while start + 12 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        chunk = data[start + 4 : start + 8 + size]
        sealed += data[start : start + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        start += 12 + size
    return sealed + data[start:]


def sealed_ogg(data: bytes) -> bytes:
    """As `sealed_png`: the pages of Ogg have one each (RFC 3533, section 6)."""
    sealed, starts = bytearray(data), [found.start() for found in re.finditer(b"OggS", data)]
    for start, end in itertools.pairwise([*starts, len(data)]):
        if start + 26 <= end:
            sealed[start + 22 : start + 26] = bytes(4)
            sealed[start + 22 : start + 26] = _ogg_checksum(sealed[start:end]).to_bytes(4, "little")
    return bytes(sealed)


def _ogg_checksum(page: bytes) -> int:
    checksum = 0
    for byte in page:
        checksum = (checksum << 8 & 0xFFFFFFFF) ^ _OGG_TABLE[checksum >> 24 ^ byte]
    return checksum


def _ogg_entry(byte: int) -> int:
    entry = byte << 24
    for _ in range(8):
        entry = (entry << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if entry >> 31 else 0)
    return entry


_OGG_TABLE = [_ogg_entry(byte) for byte in range(256)]


def mutant(extension: str, seed: int) -> bytes:
    """A file of a format, broken in one way or in several; the same for the same seed."""
    rng = np.random.default_rng([seed, sorted(FORMATS).index(extension)])
    data = bytearray(good(extension))
    for number in rng.choice(len(MUTATIONS), size=rng.choice([1, 1, 1, 2, 3]), p=SHARES):
        if data:
            MUTATIONS[number](data, rng)
    seal = {"png": sealed_png, "ogg": sealed_ogg}.get(extension, bytes) if rng.integers(4) else bytes
    return seal(bytes(data))
