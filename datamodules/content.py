"""What a message holds: texts and media, read from a text with placeholders or from a list of parts."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.modality import MODALITIES, Modality
from datamodules.rows import MEDIA_KEYS, Row, UnusableRowError, kind_of

_PLACEHOLDERS: dict[str, Modality] = {f"<{modality}>": modality for modality in MODALITIES}
_SPLIT_PLACEHOLDERS = re.compile(f"({'|'.join(_PLACEHOLDERS)})")

_DATA_URIS = tuple(f"data:{modality}/" for modality in MODALITIES)
# fmt: off
_SUFFIXES = frozenset({
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2",
    "mp4", "m4v", "mkv", "webm", "avi", "mov", "mpg", "mpeg", "wmv", "flv", "ogv",
    "wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "wma", "aif", "aiff",
})
# fmt: on
_ANSWERS = ("chosen", "rejected", "rejected_response", "rejected_responses", "rejected_messages")
_OF_PREFERENCES = frozenset([*_ANSWERS, *(f"rejected_{key}" for key in MEDIA_KEYS)])
"""Columns of preference rows: answers, whose texts may end in any word, and media that are read with them."""


@dataclass(frozen=True)
class Text:
    """A piece of text, as it stands in the row."""

    text: str


@dataclass(frozen=True)
class Media:
    """A picture, video or sound.

    Args:
        modality: Its kind.
        source: A path below `media_root`, or a `data:` URI; of a video also its frames in order, each an image of this kind.
        start: Where the part that is taken begins, in seconds; of videos and sounds.
        end: Where it ends; None: where the medium ends.
        fps: Frames shown a second, where a video is given as its frames.
    """

    modality: Modality
    source: str | tuple[str, ...]
    start: float = 0.0
    end: float | None = None
    fps: float = 2.0

    @property
    def files(self) -> tuple[str, ...]:
        """The sources, one of most media."""
        return (self.source,) if isinstance(self.source, str) else self.source


Content = Text | Media

_OPTIONS: dict[Modality, frozenset[str]] = {
    "image": frozenset(),
    "video": frozenset({"start", "end", "fps"}),
    "audio": frozenset({"start", "end"}),
}
"""What an object may say of a medium besides its source."""

_EXPECTED: dict[Modality, str] = {
    "image": "a path, a data: URI, or an object with nothing but 'path' or 'url'",
    "video": (
        "a path, a data: URI, a list of image files (its frames), or an object with 'path' or 'url', and if need be "
        "'start' and 'end' in seconds, and the 'fps' of a list of frames"
    ),
    "audio": "a path, a data: URI, or an object with 'path' or 'url', and if need be 'start' and 'end' in seconds",
}

Piece = Text | Media | Modality
"""A modality alone is a placeholder, to be filled from the row's lists."""


def read_content(content: Any, where: str) -> list[Piece]:
    """Content, a text with placeholders or a list of parts, as pieces; neighbouring texts are joined.

    Args:
        content: What the row has.
        where: Name of the turn, for errors.

    Raises:
        UnusableRowError: A part is not understood.
    """
    match content:
        case str():
            pieces = _split(content)
        case list():
            pieces = [piece for number, part in enumerate(content, 1) for piece in _read_part(part, f"part {number} of {where}")]
        case _:
            raise UnusableRowError(f"the content of {where} must be a text or a list of parts, got {kind_of(content)}")
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined


def _split(text: str) -> list[Piece]:
    return [_PLACEHOLDERS.get(piece) or Text(piece) for piece in _SPLIT_PLACEHOLDERS.split(text) if piece]


def _read_part(part: Any, where: str) -> list[Piece]:
    match part:
        case {"type": "text", "text": str(text)}:
            return _split(text)
        case {"type": "input_audio", "input_audio": {"data": str(data), "format": str(extension)}} if data and extension:
            return [Media("audio", f"data:audio/{extension};base64,{data}")]
        case {"type": "image_url" | "video_url" | "audio_url" as key}:
            return [_read_medium(part.get(key), key.removesuffix("_url"), where)]
        case {"type": "image" | "video" | "audio" as modality}:
            items = [part[key] for key in (modality, "url", "path") if part.get(key) is not None]
            return [_read_medium(items[0], modality, where) if items else modality]
    raise UnusableRowError(
        f"{where} is not understood: {str(part)[:120]}. Expected an object whose 'type' is text, image_url, "
        "video_url, audio_url, input_audio (with 'data' and 'format'), image, video or audio"
    )


def read_media(row: Row, modality: Modality) -> list[Media]:
    """The media in `images` (or `image`) and its like, in order.

    Raises:
        UnusableRowError: A list holds something else than media, or both its names are used.
    """
    keys = [key for key in (modality, f"{modality}s") if row.get(key) is not None]
    if len(keys) == 2:
        raise UnusableRowError(f"the row has both {keys[0]!r} and {keys[1]!r}: keep one of them")
    items = row[keys[0]] if keys else []
    if not isinstance(items, list):
        items = [items]
    return [_read_medium(item, modality, f"item {number} of {keys[0]!r}") for number, item in enumerate(items, 1)]


def _read_medium(item: Any, modality: Modality, where: str) -> Media:
    """A medium: its source alone, or an object with the source and what part of it is taken."""
    source, options = item, {}
    if isinstance(item, dict):
        given = {key: value for key, value in item.items() if value is not None and key != "detail"}  # detail: OpenAI's size hint
        sources = [given.pop(key) for key in ("path", "url") if key in given]
        source = sources[0] if len(sources) == 1 and given.keys() <= _OPTIONS[modality] else None
        options = given
    if isinstance(source, list) and source and modality == "video":
        source = tuple(source)
    files = source if isinstance(source, tuple) else (source,)
    if not all(isinstance(file, str) and file.strip() for file in files) or ("fps" in options and isinstance(source, str)):
        raise UnusableRowError(f"{where} must be {_EXPECTED[modality]}, got {kind_of(item)}: {str(item)[:60]!r}")
    for key, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UnusableRowError(f"{where}: {key!r} must be a number, got {kind_of(value)}: {str(value)[:60]!r}")
    medium = Media(modality, source, **options)
    if medium.start < 0 or (medium.end is not None and medium.end <= medium.start):
        raise UnusableRowError(
            f"{where} must have 0 <= start < end, in seconds, got start {medium.start} and "
            f"{'no end' if medium.end is None else f'end {medium.end}'}"
        )
    if medium.fps <= 0:
        raise UnusableRowError(f"{where}: 'fps' is the number of frames shown a second, above 0, got {medium.fps}")
    return medium


def refuse_unread_media(columns: Row) -> None:
    """Refuses a row with a medium in a column that nobody reads, so that it cannot be trained on without its pictures.

    Args:
        columns: What is left of the row when its conversation and media have been read.

    Raises:
        UnusableRowError: A value looks like the path or URI of a picture, video or sound.
    """
    for key, value in columns.items():
        medium = None if key in _OF_PREFERENCES else _find_medium(value)
        if medium is not None:
            raise UnusableRowError(
                f"{key!r} holds {medium[:60]!r}, which looks like a medium, but is not read: media stand in "
                f"{', '.join(map(repr, MEDIA_KEYS))}, or in messages. Rename the key to one of these, or leave it out"
            )


def _find_medium(value: Any) -> str | None:
    match value:
        case str() if _looks_like_medium(value.strip()):
            return value
        case list():
            return next(filter(None, map(_find_medium, value)), None)
        case {"path": item} | {"url": item}:
            return _find_medium(item)
    return None


def _looks_like_medium(text: str) -> bool:
    if text[:8].lower().startswith(("http://", "https://")):
        text = re.split("[?#]", text, maxsplit=1)[0]
    stem, _, suffix = text.rpartition(".")
    is_name = stem != "" and "\n" not in stem and suffix.lower() in _SUFFIXES
    return is_name or text[:11].lower().startswith(_DATA_URIS)


def is_blank(content: Sequence[Piece]) -> bool:
    """Whether there is neither a medium nor a text with more than white space."""
    return all(isinstance(piece, Text) and not piece.text.strip() for piece in content)
