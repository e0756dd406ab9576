"""Sizes from headers, and files that are no good. What a good one decodes to is in test_media_pixels.py."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from datamodules.media_image import ImageLimits, MediaError, decode_image, probe_image
from datamodules.sources import MediaRoot
from tests.datamodules.image_files import noise, put

LIMITS = ImageLimits()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg-progressive": ("L", "JPEG", {"progressive": True}),
    "jpeg-cmyk": ("CMYK", "JPEG", {}),
    "png": ("RGB", "PNG", {}),
    "png-palette": ("P", "PNG", {}),
    "webp": ("RGB", "WEBP", {}),
    "webp-lossless": ("RGBA", "WEBP", {"lossless": True}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
    "tiff": ("RGB", "TIFF", {}),
    "tiff-lzw": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "tiff-jpeg": ("RGB", "TIFF", {"compression": "jpeg"}),
}


def kind_of(name: str) -> bytes:
    mode, image_format, options = KINDS[name]
    depth = len(Image.new(mode, (1, 1)).tobytes())
    image = Image.frombytes(mode, (37, 23), noise(23 * 37 * depth).astype(np.uint8).tobytes())
    if mode == "P":
        image.putpalette(noise(768).tolist())
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_probe_gives_the_decoded_size_without_decoding(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, root = put(tmp_path, kind_of(kind)), MediaRoot(tmp_path)
    image = decode_image(source, root, LIMITS)
    assert (image.height, image.width) == (23, 37)

    def refuse(*args: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", refuse)
    assert probe_image(source, root, LIMITS) == (23, 37)
    with pytest.raises(AssertionError, match="pixels were decoded"):
        decode_image(source, root, LIMITS)


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "bmp", "tiff"])
def test_probe_needs_no_pixels(tmp_path: Path, kind: str) -> None:
    content = kind_of(kind)
    source, root = put(tmp_path, content[: len(content) * 9 // 10]), MediaRoot(tmp_path)
    assert probe_image(source, root, LIMITS) == (23, 37)
    with pytest.raises(MediaError, match="picture is truncated"):
        decode_image(source, root, LIMITS)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_an_error_wherever_it_is_cut(tmp_path: Path, kind: str) -> None:
    content, root = kind_of(kind), MediaRoot(tmp_path)
    for num_bytes in (12, 20, 40, len(content) // 5, len(content) // 2, len(content) * 97 // 100, len(content) - 30):
        source = put(tmp_path, content[:num_bytes])
        with pytest.raises(MediaError, match=r"picture is (truncated or damaged: .|not an image: its first bytes are)"):
            decode_image(source, root, LIMITS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"picture is empty \(0 bytes\)"),
        (
            b"Hello there, I am text",
            r"its first bytes are text \('Hello there, I am text'\); expected JPEG, PNG, WEBP, GIF, BMP, TIFF",
        ),
        (b"BMW and BMI are words, GIF is one", r"first bytes are text \('BMW"),
        (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", r"not an image: its first bytes are b'%PDF-1.4"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"not an image: its first bytes are text \('%!PS"),
        (b"\0\0\0\x1cftypavif", r"not an image: its first bytes are .*ftypavif"),
        (b"P6 2 1 255\n\1\2\3\4\5\6", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "truncated or damaged: "),
        (b"\xff\xd8\xff\xff", "truncated or damaged: "),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)), "truncated or damaged: "),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    for read in (decode_image, probe_image):
        with pytest.raises(MediaError, match=message):
            read(put(tmp_path, content), MediaRoot(tmp_path), LIMITS)


def header_of(image_format: str, side: int) -> bytes:
    if image_format == "PNG":
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"x")
    if image_format == "GIF":
        return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b"," + struct.pack("<HHHHBB", 0, 0, 9, 9, 0, 8)
    if image_format == "BMP":
        return b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    frame = b"\x08" + struct.pack(">HH", side, side) + b"\x03\1\x11\0\2\x11\0\3\x11\0"
    return b"\xff\xd8\xff\xc0\0\x11" + frame + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0"


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "JPEG"])
@pytest.mark.parametrize(("side", "count"), [(65_000, "4,225,000,000"), (10_000, "100,000,000")])
def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, image_format: str, side: int, count: str) -> None:
    source = put(tmp_path, header_of(image_format, side))
    message = f"picture is {side} x {side} = {count} pixels, above max_pixels = 50,000,000"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning of Pillow's would do instead of our error
        for read in (decode_image, probe_image):
            with pytest.raises(MediaError, match=message):
                read(source, MediaRoot(tmp_path), LIMITS)


def test_the_limits_are_inclusive(tmp_path: Path) -> None:
    source, root = put(tmp_path, Image.new("RGB", (6, 5)), "PNG"), MediaRoot(tmp_path)
    num_bytes = (tmp_path / source).stat().st_size
    assert decode_image(source, root, ImageLimits(max_pixels=30, max_bytes=num_bytes)).size == (6, 5)
    with pytest.raises(MediaError, match="5 x 6 = 30 pixels, above max_pixels = 29"):
        decode_image(source, root, ImageLimits(max_pixels=29))
    with pytest.raises(MediaError, match=f"{num_bytes} bytes, above max_bytes = {num_bytes - 1}"):
        probe_image(source, root, ImageLimits(max_bytes=num_bytes - 1))


@pytest.mark.parametrize("option", ["max_pixels", "max_bytes", "max_decode_seconds", "max_memory_bytes"])
def test_a_limit_is_above_0(option: str) -> None:
    with pytest.raises(ValueError, match=f"limits.image.{option} must be above 0, got 0"):
        ImageLimits(**{option: 0})


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.jpg", "PNG")
    assert decode_image("a.jpg", MediaRoot(tmp_path), LIMITS).getpixel((0, 0)) == (1, 2, 3)


def test_a_bad_source_is_the_same_error(tmp_path: Path) -> None:
    for source in ("../a.jpg", "/a.jpg", "http://a/a.jpg", "missing.jpg", "data:audio/wav;base64,AAAA"):
        for read in (decode_image, probe_image):
            with pytest.raises(MediaError):
                read(source, MediaRoot(tmp_path), LIMITS)
