"""Pictures of every kind are written here, with the pixels they must become; the expected pixels are literal or numpy's."""

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from datamodules.media_image import ImageLimits, MediaError, decode_image, probe_image
from datamodules.sources import MediaRoot
from tests.datamodules.image_files import noise, put

LIMITS = ImageLimits()


def pixels(folder: Path, content: Image.Image | bytes, image_format: str = "", **options: Any) -> list[list[tuple[int, ...]]]:
    image = decode_image(put(folder, content, image_format, **options), MediaRoot(folder), LIMITS)
    assert image.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


def grey(folder: Path, content: Image.Image | bytes, image_format: str = "", **options: Any) -> list[list[int]]:
    rows = pixels(folder, content, image_format, **options)
    assert all(len(set(pixel)) == 1 for row in rows for pixel in row)
    return [[pixel[0] for pixel in row] for row in rows]


def image_of(mode: str, *rows: list[Any]) -> Image.Image:
    image = Image.new(mode, (len(rows[0]), len(rows)))
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            image.putpixel((x, y), value)
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, bits: int, colour: int, row: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of one row; colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(b"\0" + row)) + after + chunk(b"IEND", b"")


def tiff(width: int, bits: int, photometric: int, row: bytes, sample_format: int = 1, order: str = "<") -> bytes:
    """An uncompressed grey TIFF of one row; photometric: 0 white is zero, 1 black is zero."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1), (279, len(row))]
    tags.append((339, sample_format))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(row))
    return head + row + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_rgb_is_kept_exactly(tmp_path: Path, image_format: str) -> None:
    expected = noise(23, 37, 3)
    options = {"lossless": True} if image_format == "WEBP" else {}
    source = put(tmp_path, Image.fromarray(expected.astype(np.uint8)), image_format, **options)
    assert np.array_equal(np.asarray(decode_image(source, MediaRoot(tmp_path), LIMITS)), expected)


def test_a_data_uri_is_decoded(tmp_path: Path) -> None:
    expected = noise(5, 4, 3)
    file = io.BytesIO()
    Image.fromarray(expected.astype(np.uint8)).save(file, "PNG")
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert np.array_equal(np.asarray(decode_image(source, MediaRoot(tmp_path), LIMITS)), expected)
    assert probe_image(source, MediaRoot(tmp_path), LIMITS) == (5, 4)


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_grey_palette_and_bilevel(tmp_path: Path, image_format: str) -> None:
    assert grey(tmp_path, image_of("L", [0, 7, 255]), image_format) == [[0, 7, 255]]
    assert grey(tmp_path, image_of("1", [0, 255, 255]), image_format) == [[0, 255, 255]]
    palette = image_of("P", [2, 0, 1])
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(tmp_path, palette, image_format) == [[(70, 80, 90), (10, 20, 30), (40, 50, 60)]]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white(tmp_path: Path, image_format: str) -> None:
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    red = image_of("RGBA", [(255, 0, 0, 128), (255, 0, 0, 255), (9, 8, 7, 0)])
    assert pixels(tmp_path, red, image_format, **options) == [[(255, 127, 127), (255, 0, 0), (255, 255, 255)]]
    black = image_of("LA", [(0, 128), (50, 255), (50, 0)])
    assert grey(tmp_path, black, image_format, **options) == [[127, 50, 255]]


def test_transparency_is_composed_as_defined(tmp_path: Path) -> None:
    rgba = noise(16, 16, 4)
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    source = put(tmp_path, Image.fromarray(rgba.astype(np.uint8)), "PNG")
    result = np.asarray(decode_image(source, MediaRoot(tmp_path), LIMITS)).astype(float)
    assert np.abs(result - (colour * alpha + 255 * (1 - alpha))).max() <= 0.501


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [(b"\x80\xff\x00", [(132, 137, 142), (40, 50, 60), (255, 255, 255)]), (1, [(10, 20, 30), (255, 255, 255), (70, 80, 90)])],
)
def test_a_palette_may_be_transparent(tmp_path: Path, transparency: bytes | int, expected: list[tuple[int, ...]]) -> None:
    palette = image_of("P", [0, 1, 2])
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert pixels(tmp_path, palette, "PNG", transparency=transparency) == [expected]
    if isinstance(transparency, int):
        assert pixels(tmp_path, palette, "GIF", transparency=transparency) == [expected]


def test_a_palette_with_alpha(tmp_path: Path) -> None:
    image = image_of("PA", [(0, 128), (1, 255)])
    image.putpalette([255, 0, 0, 40, 50, 60])
    assert pixels(tmp_path, image, "TIFF") == [[(255, 127, 127), (40, 50, 60)]]


@pytest.mark.parametrize(
    ("bits", "row", "transparent", "expected"),
    [
        (1, b"\xa0", 1, [255, 0, 255]),
        (2, b"\x18", 2, [0, 85, 255]),
        (4, b"\x12\x30", 2, [17, 255, 51]),
        (8, b"\x01\x02\x03", 2, [1, 255, 3]),
        (16, struct.pack(">HHH", 514, 515, 516), 515, [2, 255, 2]),
    ],
)
def test_a_grey_png_may_have_a_transparent_grey(
    tmp_path: Path, bits: int, row: bytes, transparent: int, expected: list[int]
) -> None:
    assert grey(tmp_path, png(3, bits, 0, row, before=chunk(b"tRNS", struct.pack(">H", transparent)))) == [expected]


def test_a_colour_png_may_have_a_transparent_colour(tmp_path: Path) -> None:
    key = chunk(b"tRNS", struct.pack(">HHH", 3, 4, 5))
    assert pixels(tmp_path, png(2, 8, 2, bytes([3, 4, 5, 3, 4, 6]), before=key)) == [[(255, 255, 255), (3, 4, 6)]]
    with pytest.raises(MediaError, match="transparent colour of 16 bits"):
        pixels(tmp_path, png(1, 16, 2, struct.pack(">HHH", 3, 4, 5), before=key))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = [0, 128, 129, 257, 32768, 65535]
    expected = [[0, 0, 1, 1, 128, 255]]
    assert grey(tmp_path, png(6, 16, 0, struct.pack(">6H", *values))) == expected
    assert grey(tmp_path, tiff(6, 16, 1, struct.pack("<6H", *values))) == expected
    assert grey(tmp_path, tiff(6, 16, 1, struct.pack(">6H", *values), order=">")) == expected
    assert grey(tmp_path, tiff(6, 16, 0, struct.pack("<6H", *values))) == [[255 - value for value in expected[0]]]
    assert grey(tmp_path, tiff(6, 32, 1, struct.pack("<6i", *values), sample_format=2)) == expected
    assert grey(tmp_path, tiff(2, 12, 1, b"\x08\x0f\xff")) == [[8, 255]]  # 0x080 and 0xfff of 0xfff


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_whole_numbers_of_an_unknown_range_are_refused(tmp_path: Path, values: list[int]) -> None:
    with pytest.raises(MediaError, match=rf"pixels from {values[0]} to {values[1]}, whose range is not known"):
        pixels(tmp_path, tiff(2, 32, 1, struct.pack("<2i", *values), sample_format=2))


def test_floating_point_is_refused_already_by_its_header(tmp_path: Path) -> None:
    source = put(tmp_path, image_of("F", [0.5, 1.0]), "TIFF")
    with pytest.raises(MediaError, match="floating-point pixels, whose range is not known"):
        probe_image(source, MediaRoot(tmp_path), LIMITS)


def test_16_bit_colour_keeps_its_high_byte(tmp_path: Path) -> None:
    assert pixels(tmp_path, png(2, 16, 2, struct.pack(">6H", 0, 255, 256, 32768, 65279, 65535))) == [[(0, 0, 1), (128, 254, 255)]]
    assert grey(tmp_path, png(2, 16, 4, struct.pack(">4H", 0, 65535, 0, 32768))) == [[0, 127]]


def test_cmyk(tmp_path: Path) -> None:
    ink = noise(8, 8, 4)
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    image = Image.frombytes("CMYK", (8, 8), ink.astype(np.uint8).tobytes())
    source = put(tmp_path, image, "TIFF")
    assert np.abs(np.asarray(decode_image(source, MediaRoot(tmp_path), LIMITS)) - expected).max() <= 1


def test_jpeg_colour_spaces(tmp_path: Path) -> None:
    for mode, colour, expected in (
        ("RGB", (200, 100, 50), (200, 100, 50)),
        ("L", 90, (90, 90, 90)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),  # written inverted, with Adobe's marker
        ("CMYK", (0, 0, 0, 155), (100, 100, 100)),
    ):
        rows = pixels(tmp_path, Image.new(mode, (16, 16), colour), "JPEG", quality=95)
        assert np.abs(np.array(rows) - expected).max() <= 2


def test_lab(tmp_path: Path) -> None:
    # CIE L*a*b* (D50) of sRGB's red is (54.3, 80.8, 69.9), of its middle grey (53.6, 0, 0); stored are L * 2.55, a + 128, b + 128
    image = image_of("LAB", [(138, 209, 198), (137, 128, 128), (255, 128, 128)])
    expected = [[(255, 0, 0), (128, 128, 128), (255, 255, 255)]]
    assert np.abs(np.array(pixels(tmp_path, image, "TIFF")) - expected).max() <= 6


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, image_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    rows = pixels(tmp_path, frames[0], image_format, save_all=True, append_images=frames[1:])
    assert np.abs(np.array(rows) - (255, 0, 0)).max() <= 3


STORED = [[10, 20, 30], [40, 50, 60]]
UPRIGHT = {
    1: STORED,
    2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]],
    4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]],
    6: [[40, 10], [50, 20], [60, 30]],
    7: [[60, 30], [50, 20], [40, 10]],
    8: [[30, 60], [20, 50], [10, 40]],
}


def exif_of(orientation: int) -> bytes:
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 274, 3, 1, orientation, 0) + bytes(4)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "TIFF-LZW", "JPEG"])
def test_orientation_is_applied_once(tmp_path: Path, image_format: str, orientation: int) -> None:
    size, options = 1, {"exif": b"Exif\0\0" + exif_of(orientation)}
    if image_format.startswith("TIFF"):
        options = {"tiffinfo": {274: orientation}, "compression": "tiff_lzw" if "LZW" in image_format else None}
    elif image_format == "WEBP":
        options["lossless"] = True
    elif image_format == "JPEG":
        size = 16  # a cell is a block of JPEG, so that it is flat
    stored = Image.fromarray(np.kron(STORED, np.ones((size, size))).astype(np.uint8))
    source = put(tmp_path, stored.convert("RGB"), image_format.removesuffix("-LZW"), **options)
    image = decode_image(source, MediaRoot(tmp_path), LIMITS)
    expected = np.kron(UPRIGHT[orientation], np.ones((size, size)))[..., None]
    assert np.abs(np.asarray(image) - expected).max() <= (2 if image_format == "JPEG" else 0)
    assert probe_image(source, MediaRoot(tmp_path), LIMITS) == expected.shape[:2]
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), np.asarray(image))  # nothing is left to apply


def test_orientation_may_follow_the_pixels_of_a_png(tmp_path: Path) -> None:
    content = png(3, 8, 0, b"\x01\x02\x03", after=chunk(b"tEXt", b"a\0b") + chunk(b"eXIf", exif_of(6)))
    assert grey(tmp_path, content) == [[1], [2], [3]]
    assert probe_image("picture", MediaRoot(tmp_path), LIMITS) == (3, 1)


@pytest.mark.parametrize("with_exif", [False, True])
def test_the_orientation_of_xmp_is_not_read(tmp_path: Path, with_exif: bool) -> None:
    xmp = b"http://ns.adobe.com/xap/1.0/\0" + b'<rdf:Description tiff:Orientation="6"/>'
    exif = b"Exif\0\0" + exif_of(1).replace(struct.pack(">H", 274), struct.pack(">H", 296))  # the unit of the resolution
    file = io.BytesIO()
    Image.new("RGB", (16, 8)).save(file, "JPEG")
    parts = [b"\xff\xe1" + struct.pack(">H", 2 + len(data)) + data for data in ([exif] if with_exif else []) + [xmp]]
    tables = file.getvalue().index(b"\xff\xdb")  # after JFIF's density, in whose absence Pillow looks into Exif at once
    source = put(tmp_path, b"".join([b"\xff\xd8", *parts, file.getvalue()[tables:]]))
    assert decode_image(source, MediaRoot(tmp_path), LIMITS).size == (16, 8)
    assert probe_image(source, MediaRoot(tmp_path), LIMITS) == (8, 16)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"", b"nonsense", exif_of(6)[:15], b"MM\0*\xff\xff\xff\xff", exif_of(0), exif_of(9)])
def test_unreadable_exif_says_nothing(tmp_path: Path, exif: bytes) -> None:
    content = png(3, 8, 0, b"\x01\x02\x03", before=chunk(b"eXIf", exif))
    assert grey(tmp_path, content) == [[1, 2, 3]]


def test_xmp_does_not_turn_a_picture(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for image_format, options in (("WEBP", {"lossless": True, "xmp": xmp}), ("TIFF", {"tiffinfo": {700: xmp}})):
        assert grey(tmp_path, image_of("RGB", [(1, 1, 1), (2, 2, 2)]), image_format, **options) == [[1, 2]]
