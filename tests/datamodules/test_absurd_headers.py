"""Headers that claim what is not there: refused for what they say, before anything of that size is read or allocated."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datamodules.content import Media
from datamodules.media import MediaLimits, decode, probe
from datamodules.media_audio import AudioLimits
from datamodules.media_image import ImageLimits
from datamodules.media_video import VideoLimits
from datamodules.modality import Modality
from datamodules.sources import MediaError, MediaRoot
from datamodules.video_reader import Library
from encoders.sampling import FrameSampling
from tests.datamodules.mutations import good

WANTED = SimpleNamespace(sampling=FrameSampling(num_frames=4), sample_rate=16_000, min_samples=1)
LIMITS = MediaLimits(
    image=ImageLimits(max_decode_seconds=5.0, max_memory_bytes=1_000_000_000),
    video=VideoLimits(max_decode_seconds=5.0, max_memory_bytes=1_000_000_000),
    audio=AudioLimits(max_decode_seconds=5.0, max_memory_bytes=1_000_000_000),
)
"""5 seconds, and less memory than what is claimed would take."""


def is_orderly(error: str) -> bool:
    """Whether a reader has said itself what is wrong."""
    return not any(words in error for words in ("its decoder", "took longer", "needs more than"))


def reason(folder: Path, modality: Modality, name: str, data: bytes, limits: MediaLimits = LIMITS) -> str:
    """What is wrong with a file, the same when it is only probed if the header shows it."""
    (folder / name).write_bytes(data)
    with pytest.raises(MediaError, match=name) as caught:
        decode(Media(modality, name), MediaRoot(folder), limits, WANTED)
    return str(caught.value)


def outcome(folder: Path, modality: Modality, name: str, limits: MediaLimits = LIMITS) -> list[str]:
    """What is said of a file that may be read or not, when it is probed and when it is decoded; empty: it is read."""
    said = []
    for function in (probe, decode):
        try:
            function(Media(modality, name), MediaRoot(folder), limits, WANTED)
        except MediaError as error:
            assert name in str(error) and is_orderly(str(error))
            said.append(str(error))
        else:
            said.append("")
    return said


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def jpg(width: int, height: int) -> bytes:
    data = bytearray(good("jpg"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def gif(width: int, height: int) -> bytes:
    data = bytearray(good("gif"))
    struct.pack_into("<HH", data, 6, width, height)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    """An extended header (RFC 9649, 2.7) before a small picture; 24 bits a side."""
    picture = good("webp")[12:]
    head = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(head)) + head + picture
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lossless_webp(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "WEBP", lossless=True)
    data = bytearray(file.getvalue())
    at = data.index(b"VP8L") + 9
    struct.pack_into("<I", data, at, width - 1 | height - 1 << 14)
    return bytes(data)


@pytest.mark.parametrize(("make", "side"), [(png, 65_000), (jpg, 65_000), (gif, 65_000), (webp, 65_000), (lossless_webp, 16_383)])
def test_a_picture_of_an_absurd_size(make: Callable[[int, int], bytes], side: int, tmp_path: Path) -> None:
    why = reason(tmp_path, "image", "a.img", make(side, side))
    is_named = f"{side} x {side} = {side * side:,} pixels, above max_pixels = 50,000,000" in why
    assert is_named or (make in (webp, lossless_webp) and "truncated or damaged" in why)  # libwebp compares sizes itself
    for width, height in ((side, 1), (1, side), (side, 700)):
        (tmp_path / "b.img").write_bytes(make(width, height))
        assert outcome(tmp_path, "image", "b.img")


@pytest.mark.parametrize("make", [png, jpg])
def test_a_picture_without_pixels(make: Callable[[int, int], bytes], tmp_path: Path) -> None:
    for width, height in ((0, 5), (5, 0), (0, 0)):
        assert reason(tmp_path, "image", "a.img", make(width, height))


@pytest.mark.parametrize(("left", "top", "width", "height"), [(60_000, 60_000, 5_000, 5_000), (0, 0, 8_000, 9_000)])
def test_a_frame_that_reaches_far_beyond_the_canvas_of_its_gif(
    left: int, top: int, width: int, height: int, tmp_path: Path
) -> None:
    file = io.BytesIO()
    Image.new("P", (4, 4), 1).save(file, "GIF")
    data = bytearray(file.getvalue())
    struct.pack_into("<HHHH", data, data.rindex(b"\x2c\0\0\0\0") + 1, left, top, width, height)
    assert "pixels" in reason(tmp_path, "image", "a.gif", bytes(data))


def by(reader: Library) -> MediaLimits:
    """The limits, with a library that reads videos."""
    return MediaLimits(video=replace(LIMITS.video, reader=reader))


def box(data: bytes, kind: bytes) -> int:
    """Where the content of a box of an MP4 begins."""
    return data.index(kind) + 4


@pytest.mark.parametrize("reader", ["decord", "pyav"])
@pytest.mark.parametrize("field", ["stsz", "stts", "stsc", "stco", "mdhd", "size", "rate"])
def test_an_mp4_that_claims_absurd_numbers(field: str, reader: Library, tmp_path: Path) -> None:
    data = bytearray(good("mp4"))
    match field:
        case "stsz":  # 2^31 frames
            struct.pack_into(">I", data, box(data, b"stsz") + 8, 1 << 31)
        case "stts":  # each of them shown for a day
            struct.pack_into(">II", data, box(data, b"stts") + 8, 0x7FFFFFFF, 0x7FFFFFFF)
        case "stsc":
            struct.pack_into(">III", data, box(data, b"stsc") + 8, 1, 0x7FFFFFFF, 1)
        case "stco":
            struct.pack_into(">I", data, box(data, b"stco") + 4, 0x7FFFFFFF)
        case "mdhd":  # no time at all, and units that are none
            struct.pack_into(">II", data, box(data, b"mdhd") + 12, 0, 0xFFFFFFFF)
        case "size":
            struct.pack_into(">HH", data, box(data, b"avc1") + 24, 65_000, 65_000)
        case "rate":
            struct.pack_into(">I", data, box(data, b"stts") + 12, 0)
    (tmp_path / "a.mp4").write_bytes(data)
    _, decoded = outcome(tmp_path, "video", "a.mp4", by(reader))
    if field in ("stsz", "stts", "rate"):
        expected = {"stsz": "damaged", "stts": "says that it has 2,147,483,647 frames", "rate": "but its header says 1.20"}
        assert expected[field] in decoded


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_an_avi_without_frames_or_with_too_many(reader: Library, tmp_path: Path) -> None:
    for num_frames in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        data = bytearray(good("avi"))
        struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, num_frames)
        struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, num_frames)
        (tmp_path / "a.avi").write_bytes(data)
        probed, decoded = outcome(tmp_path, "video", "a.avi", by(reader))
        if num_frames:
            assert f"says that it has {num_frames:,} frames" in probed and decoded == probed
        else:  # the frames are there
            assert bool(decoded) == (reader == "decord")
    data = good("avi")
    why = reason(tmp_path, "video", "b.avi", data[: data.index(b"movi") + 4], by(reader))
    assert "holds no frames" in why


def wav(samples: np.ndarray, rate: int = 16_000, size: int | None = None, channels: int = 1, bits: int | None = None) -> bytes:
    is_float, bits = samples.dtype.kind == "f", bits or samples.dtype.itemsize * 8
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", 3 if is_float else 1, channels, rate, rate * frame & 0xFFFFFFFF, frame & 0xFFFF, bits)
    data = samples.tobytes()
    size = len(data) if size is None else size
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", min(size + 36, 0xFFFFFFFF)) + body


HALF = np.full(16_000, 0.5, np.float32)


def test_a_wav_that_is_as_it_says_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(HALF))
    read = decode(Media("audio", "a.wav"), MediaRoot(tmp_path), LIMITS, WANTED)
    assert np.array_equal(read.samples_S, HALF)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (wav(HALF, size=0x70000000), "ends earlier than it says"),
        (wav(HALF, size=1_000_000), "ends earlier than it says"),
        (wav(HALF, rate=0), ""),
        (wav(HALF, rate=1), "lasts 16,000.00 s, above max_seconds = 3600"),
        (wav(HALF, rate=0xFFFFFFFF), ""),
        (wav(HALF, rate=2_147_483_647), "share too few divisors"),
        (wav(HALF, channels=0), ""),
        (wav(HALF, channels=65_535), ""),
        (wav(HALF, bits=7), ""),
        (wav(HALF[:0]), ""),
        (wav(np.where(np.arange(16_000) == 9_000, np.float32("nan"), HALF)), "infinite or no numbers"),
        (wav(np.where(np.arange(16_000) == 0, np.float32("inf"), HALF)), "infinite or no numbers"),
        (wav(np.where(np.arange(16_000) == 15_999, np.float32("-inf"), HALF)), "infinite or no numbers"),
        (wav(HALF * np.float32(1e30)), "samples up to 5e"),
    ],
)
def test_a_wav_that_claims_or_holds_what_cannot_be(data: bytes, why: str, tmp_path: Path) -> None:
    found = reason(tmp_path, "audio", "a.wav", data)
    assert why in found and is_orderly(found)


def test_a_pipe_wrote_a_wav_of_4_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(HALF, size=0xFFFFFFFF))
    read = decode(Media("audio", "a.wav"), MediaRoot(tmp_path), LIMITS, WANTED)
    assert np.array_equal(read.samples_S, HALF)  # type: ignore[union-attr]
