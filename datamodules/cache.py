"""Tensors on disk by key: written whole or not at all, read by any process, the least recently used deleted first."""

import contextlib
import json
import logging
import os
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.abandoned import is_abandoned

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheOptions:
    """Where a cache lies, and how big it may become.

    Args:
        folder: Any number of runs, processes and machines may share it.
        max_gb: Limit on the size of its files, in 10^9 bytes; the least recently used are deleted first.
    """

    folder: str
    max_gb: float = 20.0

    def __post_init__(self) -> None:
        if not self.max_gb > 0:
            raise ValueError(f"max_gb of the cache {self.folder} must be above 0, got {self.max_gb}: to have none, leave it null")

    def open(self) -> "TensorCache":
        """The cache, its folder made.

        Raises:
            ValueError: The folder cannot be made.
        """
        folder = Path(self.folder).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the cache folder {folder} cannot be made ({error.strerror}): give another one, or leave the cache null"
            ) from error
        return TensorCache(folder, int(self.max_gb * 1e9))


class Entry(NamedTuple):
    """A tensor, and what was noted beside it."""

    tensor: Tensor
    notes: dict[str, str]


class TensorCache:
    """Tensors in a folder, a safetensors file each; whoever shares it needs no lock.

    What cannot be read (not there, deleted meanwhile, damaged, of another key) is a miss, which the next `put` mends. What
    cannot be written, on a full disk or because it is bigger than the limit, is left out; a warning says so once.

    Args:
        folder: It exists.
        max_bytes: Limit on the size of all files. It is kept by who writes: where the next file does not fit, the files
            whose last use lies furthest back make room, an eighth of the limit at once. A process looks at what others have
            written after each sixteenth of the limit that it writes itself; by so much each of them may exceed it meanwhile.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._num_bytes: int | None = None  # of all files, when looked at last, and what was written since
        self._unseen_bytes = 0
        self._has_warned = False

    def get(self, key: str) -> Entry | None:
        """What `put` wrote under this key, bit for bit; None: it is not there."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(key)
        try:
            data = path.read_bytes()
            tensor = load(data)["tensor"]
            notes: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if notes.pop("checksum") != _checksum(key, tensor, notes):
                return None
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of its last use
        return Entry(tensor, notes)

    def put(self, key: str, tensor: Tensor, notes: Mapping[str, str] | None = None) -> None:
        """Writes a tensor, from any device, in its own type.

        Args:
            key: Hexadecimal digits.
            tensor: The tensor.
            notes: What `get` is to give with it.
        """
        from safetensors.torch import save

        tensor, notes = tensor.detach().cpu().contiguous(), dict(notes or {})
        data = save({"tensor": tensor}, {**notes, "checksum": _checksum(key, tensor, notes)})
        if len(data) > self.max_bytes:
            self._warn(f"a tensor of {len(data):,} bytes is above its limit of {self.max_bytes:,}")
            return
        self._make_room(len(data))
        path = self._path(key)
        unfinished = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(data)
            unfinished.replace(path)
        except OSError as error:
            self._warn(str(error.strerror))
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert len(key) > 8 and set(key) <= set("0123456789abcdef"), f"not hexadecimal digits: {key!r}"
        return self.folder / key[:2] / f"{key}.safetensors"

    def _make_room(self, num_bytes: int) -> None:
        if self._num_bytes is None or self._unseen_bytes > self.max_bytes // 16 or self._num_bytes + num_bytes > self.max_bytes:
            self._num_bytes, self._unseen_bytes = self._delete_oldest(num_bytes), 0
        self._num_bytes += num_bytes
        self._unseen_bytes += num_bytes

    def _delete_oldest(self, num_bytes: int) -> int:
        """Makes room for `num_bytes` if there is none; returns the bytes that are left."""
        files = self._files()
        left = sum(file.num_bytes for file in files)
        if left + num_bytes <= self.max_bytes:
            return left
        for file in sorted(files):
            if left + num_bytes <= self.max_bytes - self.max_bytes // 8:
                break
            try:
                file.path.unlink(missing_ok=True)  # another process may have been quicker
            except OSError as error:
                self._warn(f"{file.path.name} cannot be deleted: {error.strerror}")
            else:
                left -= file.num_bytes
        return left

    def _files(self) -> "list[_File]":
        files: list[_File] = []
        for shard in _scan(self.folder):
            for item in _scan(Path(shard.path)):
                with contextlib.suppress(OSError):  # deleted meanwhile
                    status = item.stat()
                    if not item.name.startswith("."):
                        files.append(_File(status.st_mtime_ns, status.st_size, Path(item.path)))
                    elif is_abandoned(status):
                        Path(item.path).unlink()
        return files

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            log.warning("the cache %s could not be written (%s): what is not in it is computed each time", self.folder, reason)
            self._has_warned = True


class _File(NamedTuple):
    used_ns: int
    num_bytes: int
    path: Path


def _scan(folder: Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # gone, or a stray file where a folder is expected
        return []


def _checksum(key: str, tensor: Tensor, notes: Mapping[str, str]) -> str:
    """CRC-32 of all that is kept: safetensors itself would not notice a changed bit."""
    head = json.dumps([key, str(tensor.dtype), list(tensor.shape), notes], sort_keys=True)
    return str(zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(head.encode())))
