"""How a source becomes a picture: decoding and probing with Pillow. Whatever is wrong with a file is one `MediaError`.

Shape suffixes: H height, W width.
"""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from datamodules.jpeg_header import ImageHeader, read_jpeg_header
from datamodules.sources import MediaError, MediaRoot, as_file, media_name, resolve

IMAGE_FORMATS: dict[str, tuple[re.Pattern[bytes], type[ImageFile]]] = {
    "JPEG": (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    "PNG": (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    "WEBP": (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImageFile),
    "GIF": (re.compile(rb"GIF8[79]a"), GifImageFile),
    "BMP": (re.compile(rb"BM.{13}\0\0\0", re.DOTALL), BmpImageFile),
    "TIFF": (re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile),
}
"""What a file of a format starts with, and its reader. The content decides, not the name.

The readers are called directly, since `Image.open` compares with a limit of its own before the size can be named.
"""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation (Exif 2.32, tag 274); 5 to 8 swap height and width."""

_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for a file that is cut off or damaged."""


@dataclass(frozen=True)
class ImageLimits:
    """How big an image may be; a bigger one is an error, raised before its pixels are decoded.

    Args:
        max_pixels: Height times width.
        max_bytes: Size of the file, or of what a `data:` URI holds.
        max_decode_seconds: How long reading one may take; to be raised where the disk is far away.
        max_memory_bytes: How much memory reading one may take.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 50_000_000
    max_decode_seconds: float = 60.0
    max_memory_bytes: int = 4_000_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"limits.image.{name} must be above 0, got {value}")


def probe_image(source: str, media_root: MediaRoot, limits: ImageLimits) -> tuple[int, int]:
    """Height and width of the upright image, from its header, without decoding its pixels.

    Raises:
        MediaError: The source cannot be used, or its header cannot be read.
    """
    with _open_file(source, media_root, limits) as file:
        name = media_name(source)
        header = read_jpeg_header(file)
        if header is None:
            image = _open_image(file, name, limits)
            header = ImageHeader(*image.size, _orientation(image))
        else:
            _check_size(header.width, header.height, name, limits)
    return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)


def decode_image(source: str, media_root: MediaRoot, limits: ImageLimits) -> Image.Image:
    """Decodes an image: RGB, 8 bit, upright, transparency on white; of an animation the first frame.

    The orientation is EXIF's, as in browsers (a copy of it in XMP is not read; unreadable EXIF says nothing). 16-bit grey is
    scaled to 8 bit by its range. Colour profiles are not applied.

    Raises:
        MediaError: The source cannot be used, or is not an image that can be decoded whole.
    """
    with _open_file(source, media_root, limits) as file:
        name = media_name(source)
        image = _open_image(file, name, limits)
        turn = _TURNS.get(_orientation(image))
        _fit_transparent_colour(image, name)
        image.load()
        rgb = _to_rgb(image, name)
        if turn is not None:
            rgb = rgb.transpose(turn)
    rgb.info.clear()  # it still holds the orientation, which is applied now
    return rgb


@contextmanager
def _open_file(source: str, media_root: MediaRoot, limits: ImageLimits) -> Iterator[BinaryIO]:
    """Yields the file of a source; what is then raised of it is a `MediaError`."""
    name = media_name(source)
    with as_file(resolve(source, media_root, "image", limits.max_bytes), name) as file:
        try:
            yield file
        except MediaError:
            raise
        except _DAMAGE as error:
            raise MediaError(f"{name} is truncated or damaged: {error or type(error).__name__}") from error


def _open_image(file: BinaryIO, name: str, limits: ImageLimits) -> ImageFile:
    """Pillow's picture of a file, with its header read and checked."""
    file.seek(0)
    head = file.read(32)
    reader = next((reader for pattern, reader in IMAGE_FORMATS.values() if pattern.match(head)), None)
    if reader is None:
        raise MediaError(f"{name} is not an image: its first bytes are {_describe(head)}; expected {', '.join(IMAGE_FORMATS)}")
    file.seek(0)
    image = reader(file)
    _check_size(*image.size, name, limits)
    if image.mode == "F":
        raise MediaError(f"{name} has floating-point pixels, whose range is not known: convert it to 8 or 16 bit")
    return image


def _describe(head: bytes) -> str:
    is_text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return f"text ({head.decode('ascii')!r})" if is_text else repr(head)


def _check_size(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise MediaError(f"{name} is {height} x {width} = {height * width:,} pixels, above max_pixels = {limits.max_pixels:,}")


def _orientation(image: ImageFile) -> int:
    """EXIF orientation that is left to apply, 1 (upright) to 8, from the header."""
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)  # else Pillow takes the orientation from there too
    if isinstance(image, TiffImageFile):
        return 1  # Pillow turns these itself, and gives the size after the turn
    try:
        if isinstance(image, JpegImageFile):
            exif = Image.Exif()  # that of the image was made as it was opened, and from XMP too
            exif.load(image.info.get("exif", b""))
        else:
            exif = Image.Image.getexif(image)  # the method of PngImageFile would decode the pixels
        if not exif and isinstance(image, PngImageFile):
            exif.load(_find_png_exif(image))
        orientation = exif.get(ExifTags.Base.Orientation)
    except _DAMAGE:
        return 1
    return orientation if orientation in _TURNS else 1


def _find_png_exif(image: PngImageFile) -> bytes:
    """EXIF of a PNG, wherever it stands: it may follow the pixels (PNG extensions 1.5.0, 3.7)."""
    file = image.fp
    assert file is not None
    start = file.tell()
    exif = b""
    file.seek(8)
    while not exif and len(head := file.read(8)) == 8:
        num_bytes, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            exif = file.read(num_bytes)
        file.seek(num_bytes + 4, os.SEEK_CUR)  # 4: the checksum
    file.seek(start)
    return exif


def _fit_transparent_colour(image: ImageFile, name: str) -> None:
    """Scales the transparent colour of a PNG as its pixels are: Pillow leaves it in the bits of the file."""
    if not isinstance(image, PngImageFile) or "transparency" not in image.info or not image.tile:
        return
    raw_mode = image.tile[0].args  # of the file, where image.mode is that of the pixels
    if raw_mode == "RGB;16B":
        raise MediaError(f"{name} has a transparent colour of 16 bits, decoded to 8: save it with an alpha channel instead")
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] *= 85 if raw_mode == "L;2" else 17


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None  # it is None only where it works in place
        return converted
    if image.mode.startswith("I"):
        image = _to_8_bit(image, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    on_white = Image.new("RGB", rgba.size, "white")
    on_white.paste(rgba, mask=rgba)
    return on_white


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Grey of up to 16 bits (Pillow's I;16, I;16B and I) to 8 bits, with its transparent grey as alpha."""
    grey_HW = np.asarray(image).astype(np.int32)
    low, high, full, invert = int(grey_HW.min()), int(grey_HW.max()), 65535, False
    if low < 0 or high > full:
        raise MediaError(f"{name} has pixels from {low} to {high}, whose range is not known: convert it to 8 or 16 bit")
    if isinstance(image, TiffImageFile):
        full = 4095 if image.tag_v2.get(BITSPERSAMPLE) == (12,) else full
        invert = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0  # white is zero, which Pillow heeds in 8 bit only
    scaled_HW = (grey_HW * 510 + full) // (2 * full)  # v * 255 / full, to the nearest
    scaled = Image.fromarray((255 - scaled_HW if invert else scaled_HW).astype(np.uint8))
    if "transparency" in image.info:
        scaled.putalpha(Image.fromarray(np.where(grey_HW == image.info["transparency"], 0, 255).astype(np.uint8)))
    return scaled
