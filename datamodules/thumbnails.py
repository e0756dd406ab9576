"""Small pictures of media, for tables and pages: an image itself, three frames of a clip, how loud a sound is over its time.

Shape suffixes: F frames, H height, W width, S samples, P columns of pixels.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from datamodules.media import Decoded
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip

THUMBNAIL_PIXELS = 176
"""Longest side of a picture in the table: twice what the page shows, for fine screens."""


def thumbnail(decoded: Decoded) -> Image.Image:
    """A picture of a medium."""
    if isinstance(decoded, Clip):
        num_frames = len(decoded.frames_FHW3)
        shown = sorted({0, num_frames // 2, num_frames - 1})
        picture = side_by_side([Image.fromarray(decoded.frames_FHW3[frame]) for frame in shown])
    elif isinstance(decoded, Waveform):
        return _loudness(decoded)
    else:
        picture = decoded.convert("RGB")
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row."""
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return sheet


def data_uri(picture: Image.Image) -> str:
    """A picture as text that a page can hold: without loss where it is small, since JPEG would blur the few pixels of an icon."""
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    file = io.BytesIO()
    picture.convert("RGB").save(file, format=kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _loudness(sound: Waveform) -> Image.Image:
    """The largest amplitude in each column of pixels, above and below the middle; the full height is an amplitude of 1."""
    middle = THUMBNAIL_PIXELS // 4
    picture = Image.new("RGB", (THUMBNAIL_PIXELS, 2 * middle), "white")
    draw = ImageDraw.Draw(picture)
    loudest_P = [float(np.abs(part).max(initial=0.0)) for part in np.array_split(sound.samples_S, THUMBNAIL_PIXELS)]
    for column, loudest in enumerate(loudest_P):
        height = round(min(loudest, 1.0) * (middle - 1))
        draw.line((column, middle - height, column, middle + height), fill="#3b6ea5")
    return picture
