"""Where a medium lies: a path below the media root, or a `data:` URI. Nothing is fetched from a network."""

import base64
import contextlib
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote_to_bytes

from datamodules.modality import Modality

_OTHER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG")
"""Tried for the hint where a file is missing; a look into the folder would cost more, the bigger it is."""


class MediaError(ValueError):
    """A medium that cannot be used; the text names it and says why."""


@dataclass(frozen=True)
class MediaRoot:
    """The folder that media paths are below; nothing outside it is opened.

    Args:
        path: The folder.

    Raises:
        ValueError: It does not exist, or is not a folder.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            reason = "is not a folder" if self.path.exists() else "does not exist"
            raise ValueError(
                f"media_root {self.path.absolute()} {reason}: give the folder that the media paths of the rows start from"
            )
        object.__setattr__(self, "path", self.path.resolve())  # once: each source is compared with it


def resolve(source: str, media_root: MediaRoot, modality: Modality, max_bytes: int) -> Path | bytes:
    """Finds a source: the path of its file, or the bytes of its `data:` URI.

    Args:
        source: As the row has it.
        media_root: The folder that paths are below.
        modality: What a `data:` URI must say it holds.
        max_bytes: The limit on its size.

    Raises:
        MediaError: It is a URL, leaves the root, is missing, not a regular file, empty, too big, or a malformed URI.
    """
    found: Path | bytes
    if _is_data_uri(source):
        found = _decode_data_uri(source, modality)
        num_bytes = len(found)
    else:
        found, status = _locate(source, media_root)
        num_bytes = status.st_size
    if num_bytes == 0:
        raise MediaError(f"{media_name(source)} is empty (0 bytes)")
    if num_bytes > max_bytes:
        raise MediaError(f"{media_name(source)} is {num_bytes:,} bytes, above max_bytes = {max_bytes:,}")
    return found


def content_key(source: str, media_root: MediaRoot) -> str:
    """A cheap key that tells two sources apart: path, size and time of a file, or the hash of a `data:` URI.

    Raises:
        MediaError: The file cannot be found.
    """
    if _is_data_uri(source):
        return "data:" + hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    path, status = _locate(source, media_root)
    return f"{path}|{status.st_size}|{status.st_mtime_ns}"


class FileState(NamedTuple):
    """A file, and what does not stay the same where its content changes: `changed_ns` (ctime) cannot be set by hand."""

    path: Path
    device: int
    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int


def find_file(source: str, media_root: MediaRoot) -> FileState | None:
    """The file of a source as it is now; None for a `data:` URI.

    Raises:
        MediaError: It cannot be found.
    """
    if _is_data_uri(source):
        return None
    path, status = _locate(source, media_root)
    return FileState(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def time_span(name: str, start: float, end: float | None, seconds: float) -> tuple[float, float]:
    """The part of a video or sound from `start` to `end`; an end that is up to 0.1 seconds late is the medium's own.

    Args:
        name: The medium, for errors.
        start: In seconds.
        end: In seconds; None: where the medium ends.
        seconds: Length of the medium.

    Raises:
        MediaError: The part lies beyond the medium.
    """
    if start and start >= seconds:
        raise MediaError(f"{name} is {seconds:.2f} seconds long, but the row takes it from start = {start:g}")
    if end is not None and end > seconds + 0.1:
        raise MediaError(
            f"{name} is {seconds:.2f} seconds long, but the row takes it up to end = {end:g}: lower it, or leave it out to take "
            "the rest"
        )
    return start, seconds if end is None else min(end, seconds)


def full_name(source: str, media_root: MediaRoot) -> str:
    """A name that a medium has in all rows of all sources, found without looking for it."""
    return source if _is_data_uri(source) else os.path.normpath(media_root.path / source)


@contextlib.contextmanager
def as_file(found: Path | bytes, name: str) -> Iterator[BinaryIO]:
    """Yields a file to read from.

    Args:
        found: Its path, or its bytes.
        name: Of the source, for errors.

    Raises:
        MediaError: It cannot be opened.
    """
    try:
        file: BinaryIO = io.BytesIO(found) if isinstance(found, bytes) else found.open("rb")
    except OSError as error:
        raise MediaError(f"{name} cannot be opened: {error}") from error
    with file:
        yield file


def media_name(source: str) -> str:
    """The source as errors name it: a long one is shortened."""
    if len(source) > 200:
        return f"{source[:40]}... ({len(source):,} characters)"
    return source or "the empty path"


def _is_data_uri(source: str) -> bool:
    return source[:5].lower() == "data:"


def _decode_data_uri(source: str, modality: Modality) -> bytes:
    """The bytes of a URI of RFC 2397, base64 or percent-encoded."""
    header, comma, body = source[len("data:") :].partition(",")
    media_type, *parameters = [part.strip().lower() for part in header.split(";")]
    if not comma or not media_type.startswith(f"{modality}/"):
        raise MediaError(
            f"{media_name(source)} is not a data URI of this modality: expected data:{modality}/<type>;base64,<data>"
        )
    try:
        data = unquote_to_bytes(body)
        return base64.b64decode(b"".join(data.split()), validate=True) if "base64" in parameters else data
    except ValueError as error:
        raise MediaError(f"{media_name(source)} is a malformed data URI: {error}") from error


def _locate(source: str, media_root: MediaRoot) -> tuple[Path, os.stat_result]:
    name, root = media_name(source), media_root.path
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", source):
        raise MediaError(f"{name} is a URL, and media must be local: download it, and give its path below media_root = {root}")
    plain = _look_along(str(root), source)
    if plain is not None and stat.S_ISREG(plain.st_mode):
        return root / source, plain
    if Path(source).is_absolute():
        raise MediaError(f"{name} is an absolute path: give the path below media_root = {root}")
    try:
        path = Path(os.path.realpath(f"{root}/{source}"))  # `Path.resolve` would look at the file once more
        inside = path.is_relative_to(root)
        status = path.stat() if inside else None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(f"{name} does not exist: looked for {path}{_other_suffix(path)}") from error
    except (OSError, ValueError) as error:  # too long, no permission, a loop of symlinks; a NUL
        raise MediaError(f"{name!r} cannot be used as a path below media_root = {root}: {error}") from error
    if status is None:
        raise MediaError(f"{name} leads out of media_root = {root} (to {path}): put the file, or media_root, elsewhere")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{name} is {'a folder' if path.is_dir() else 'not a regular file'}: expected a file at {path}")
    return path, status


def _look_along(root: str, source: str) -> os.stat_result | None:
    """What lies at a source whose names are all plain, so that neither a symlink nor `..` leads it elsewhere.

    Each name below the root is looked at once, where `os.path.realpath` looks at those of the root as well. None: there is
    nothing, or a name is not plain.
    """
    names = source.split("/")
    if "\\" in source or not {"", ".", ".."}.isdisjoint(names):
        return None
    here, status = root, None
    try:
        for name in names:
            here = f"{here}/{name}"
            status = os.lstat(here)
            if stat.S_ISLNK(status.st_mode):
                return None
    except (OSError, ValueError):
        return None
    return status


def _other_suffix(path: Path) -> str:
    """A hint, where the missing file is there under another extension."""
    for suffix in _OTHER_SUFFIXES:
        with contextlib.suppress(OSError):  # the longer name may be too long
            other = path.with_suffix(suffix)
            if other.is_file():
                return f"; there is a {other.name}"
    return ""
