"""The size and orientation that are planned with are those of Pillow, whatever stands in a file, or Pillow is asked."""

import io
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from datamodules.jpeg_header import ImageHeader, read_jpeg_header
from datamodules.media_image import ImageLimits, MediaError, decode_image, probe_image
from datamodules.sources import MediaRoot
from tests.datamodules.image_files import put

ORDERS = {"<": b"II*\0", ">": b"MM\0*"}
DAMAGE = (OSError, SyntaxError, OverflowError)
"""What Pillow raises for the files made here."""


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def exif(order: str, orientation: int | None, draw: random.Random, thumbnail: bytes = b"") -> bytes:
    """An Exif segment of a camera: a maker, the orientation among other entries, and a small picture in another directory."""
    entries = [(0x010F, 2, b"Maker of cameras\0"), (0x011A, 5, struct.pack(f"{order}II", 72, 1)), (0x0128, 3, None)]
    entries += [(0x0131, 2, b"1.0\0"), (0x8769, 4, None)] if draw.random() < 0.5 else []
    if orientation is not None:
        entries.append((0x0112, 3, struct.pack(f"{order}H", orientation)))
    entries.sort()
    start = 8 + 2 * draw.randint(0, 40)
    place = start + 2 + 12 * len(entries) + 4
    table, values = struct.pack(f"{order}H", len(entries)), b""
    for tag, kind, value in entries:
        content = value if value is not None else struct.pack(f"{order}{'H' if kind == 3 else 'I'}", 2)
        count = len(content) // {2: 1, 3: 2, 4: 4, 5: 8}[kind]
        if len(content) > 4:
            field, values = struct.pack(f"{order}I", place + len(values)), values + content
        else:
            field = content.ljust(4, b"\0")
        table += struct.pack(f"{order}HHI", tag, kind, count) + field
    second = place + len(values) if thumbnail else 0
    body = ORDERS[order] + struct.pack(f"{order}I", start) + draw.randbytes(start - 8) + table
    body += struct.pack(f"{order}I", second) + values
    if thumbnail:
        own = [(0x0201, 4, 1, second + 2 + 24 + 4), (0x0202, 4, 1, len(thumbnail))]
        body += (
            struct.pack(f"{order}H", 2) + b"".join(struct.pack(f"{order}HHII", *entry) for entry in own) + bytes(4) + thumbnail
        )
    return segment(0xE1, b"Exif\0\0" + body)


def encoded(draw: random.Random, width: int, height: int, mode: str | None = None) -> bytes:
    mode = mode or draw.choice(["L", "RGB", "CMYK"])
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.frombuffer(draw.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(
        file,
        "JPEG",
        quality=draw.randint(1, 95),
        progressive=draw.random() < 0.5,
        optimize=draw.random() < 0.5,
        restart_marker_blocks=draw.choice([0, 0, 3]),
        comment=draw.choice([b"", b"made by hand"]),
        dpi=draw.choice([(0, 0), (72, 72)]),
    )
    return file.getvalue()


def photograph(draw: random.Random) -> tuple[bytes, ImageHeader]:
    """A file and what its header says: any size, coding and mode, and whatever else cameras and programs write into files."""
    width, height = draw.randint(1, 70), draw.randint(1, 70)
    content = encoded(draw, width, height)
    orientation = draw.choice([None, *range(11)])
    thumbnail = draw.choice([b"", encoded(draw, 16, 12, "RGB"), encoded(draw, 16, 12, "RGB") + draw.randbytes(20_000)])
    extra = [
        exif(draw.choice("<>"), orientation, draw, thumbnail),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='6'/>" + draw.randbytes(draw.randint(0, 9000))),
        b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([part, 3]) + draw.randbytes(9000)) for part in (1, 2, 3)),
        segment(0xE2, b"MPF\0" + draw.randbytes(80)),
        segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", 6) + b"abcdef"),
        segment(0xFE, b"a comment"),
    ]
    chosen = draw.sample(extra, draw.randint(0, len(extra)))
    applied = orientation if extra[0] in chosen and orientation in range(1, 9) else 1
    start = content.index(b"\xff\xdb") if draw.random() < 0.3 and b"Adobe" not in content else 2  # some have no JFIF
    return content[:2] + b"".join(chosen) + content[start:], ImageHeader(width, height, applied or 1)


def pillow(content: bytes) -> ImageHeader | None:
    """What Pillow says of a file; None: that it is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = JpegImageFile(io.BytesIO(content))
        except DAMAGE:
            return None
        read = Image.Exif()
        try:
            read.load(image.info.get("exif", b""))
            orientation = read.get(0x0112, 1)
        except (*DAMAGE, struct.error):
            orientation = 1
    return ImageHeader(*image.size, orientation if orientation in range(1, 9) else 1)


def scanned(content: bytes) -> ImageHeader | None:
    return read_jpeg_header(io.BytesIO(content))


def seeded(seeds: int) -> Iterator[random.Random]:
    for seed in range(seeds):
        yield random.Random(seed)


def test_the_header_is_that_of_the_file(tmp_path: Path) -> None:
    num_scanned = 0
    for draw in seeded(150):
        content, expected = photograph(draw)
        assert pillow(content) == expected
        header = scanned(content)
        assert header in (None, expected)
        num_scanned += header is not None
        assert (header is None) == (b"Photoshop" in content)
        source, root = put(tmp_path, content), MediaRoot(tmp_path)
        image = decode_image(source, root, ImageLimits())
        assert probe_image(source, root, ImageLimits()) == (image.height, image.width)
    assert num_scanned > 70


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_read_in_both_byte_orders(order: str, orientation: int) -> None:
    draw = random.Random(orientation)
    thumbnail = encoded(draw, 16, 12, "RGB")  # has a frame of its own
    content = encoded(draw, 40, 30)
    content = content[:2] + exif(order, orientation, draw, thumbnail) + content[2:]
    assert scanned(content) == pillow(content) == ImageHeader(40, 30, orientation)


def segments(content: bytes) -> list[bytes]:
    """The segments before the first scan, its own, and the rest."""
    parts, place, marker = [], 2, 0
    while marker != 0xDA:
        marker, length = struct.unpack_from(">xBH", content, place)
        parts.append(content[place : place + 2 + length])
        place += 2 + length
    return [*parts, content[place:]]


def test_a_file_that_is_cut_anywhere_before_its_pixels_is_left_to_pillow(tmp_path: Path) -> None:
    for draw in seeded(20):
        content, expected = photograph(draw)
        pixels = len(content) - len(segments(content)[-1])
        assert all(scanned(content[:end]) is None for end in range(pixels) if end < 2000 or pixels - end < 300)
        assert scanned(content[:pixels]) in (None, expected)
        assert pillow(content[:pixels]) == expected
        for end in (*draw.sample(range(1, pixels), 20), pixels - 1):
            assert pillow(content[:end]) is None
            with pytest.raises(MediaError, match="picture is (truncated or damaged|not an image)"):
                probe_image(put(tmp_path, content[:end]), MediaRoot(tmp_path), ImageLimits())


def flip(content: bytes, draw: random.Random) -> bytes:
    """Other bytes."""
    changed = bytearray(content)
    for place in draw.choices(range(min(len(content), 700)), k=draw.randint(1, 6)):
        changed[place] = draw.choice([0, 1, 2, 255, changed[place] ^ 1 << draw.randrange(8), draw.randrange(256)])
    return bytes(changed)


NAMES = [b"", b"JFIF\0", b"Exif\0\0", b"Exif\0\0II*\0", b"Adobe", b"ICC_PROFILE\0", b"Photoshop 3.0\0", b"Photoshop 3.0\x008BIM"]
BETWEEN = [b"\xff", b"\xff\xff", b"\0", b"ab", b"\xff\0", b"\xff\x01", b"\xff\xd0", b"\xff\xd8", b"\xff\xd9"]


def rearrange(content: bytes, draw: random.Random) -> bytes:
    """Other segments: missing, twice, cut short, of a wrong length, strange; and fill bytes, junk or bare markers."""
    *parts, pixels = segments(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(parts))
        part = parts[place]
        any_marker = draw.choice([*range(0xC0, 0xD0), *range(0xDA, 0xF1), 0xFE])
        parts[place : place + 1] = draw.choice(
            [
                [],
                [part, part],
                [segment(part[1], part[4 : draw.randint(4, len(part))])],
                [part[:2] + struct.pack(">H", draw.randint(0, len(part))) + part[4:]],
                [segment(any_marker, draw.choice(NAMES) + draw.randbytes(draw.randint(0, 30))), part],
                [segment(draw.choice([0xE0, 0xE1, 0xE2, 0xEE]), draw.choice(NAMES) + draw.randbytes(draw.randint(0, 9))), part],
            ]
        )
        parts = parts or [part]
    if draw.random() < 0.3:
        pixels, place = parts.pop() + pixels, draw.randrange(len(parts) + 1)
        parts[place:place] = [draw.choice(BETWEEN)]
    return content[:2] + b"".join(parts) + pixels


@pytest.mark.parametrize("damage", [flip, rearrange])
def test_whatever_else_a_file_holds_the_header_is_that_of_pillow(damage: Callable[[bytes, random.Random], bytes]) -> None:
    seen = {"scanned": 0, "left to Pillow": 0, "damaged": 0}
    for draw in seeded(1500):
        content = damage(photograph(draw)[0], draw)
        header, expected = scanned(content), pillow(content)
        assert header in (None, expected), content
        seen["damaged" if expected is None else "left to Pillow" if header is None else "scanned"] += 1
    assert min(seen.values()) > 50, seen


@pytest.mark.parametrize(
    "entry",
    [
        (0x0112, 4, 1, 6),  # a long
        (0x0112, 3, 2, 6),
        (0x0112, 3, 0, 6),
        (0x0112, 9, 1, 6),
        (0x010F, 2, 90, 99),  # a text beyond the end, with which Pillow stops reading
        (0x010F, 2, 5, 0xFFFFFFFF),
        (0x010F, 77, 1, 6),  # of no known type
        (0x010F, 13, 1, 6),
        (0x011A, 1, 1, 6),  # a resolution that is no fraction, which ends Pillow
        (0x011A, 3, 1, 6),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_an_odd_entry_of_exif_is_left_to_pillow(order: str, entry: tuple[int, int, int, int]) -> None:
    content = encoded(random.Random(3), 40, 30)
    own = (0x0112, 3, 1, 6 if order == "<" else 6 << 16)
    for entries in ((entry, own), (own, entry)):
        body = ORDERS[order] + struct.pack(f"{order}IH", 8, 2) + b"".join(struct.pack(f"{order}HHII", *each) for each in entries)
        file = content[:2] + segment(0xE1, b"Exif\0\0" + body + struct.pack(f"{order}HHI", 296, 3, 1) + bytes(8)) + content[2:]
        assert scanned(file) is None
