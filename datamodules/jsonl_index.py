"""The index of a JSON-lines file: the byte offset of each row, in a file that is mapped, not read.

Shape suffixes: L lines of a block, R rows, S = R + 1 boundaries of rows, K blank lines.
"""

import glob
import hashlib
import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datamodules.abandoned import sweep_abandoned

BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20
_WORD = np.dtype("<u8")
_MAGIC = int.from_bytes(b"OMNIJSNL", "little")
_VERSION = 2
_HEADER_WORDS = 10  # magic, version, size and mtime_ns of the file, rows, blank lines, SHA-256 of the file


class Stamp(NamedTuple):
    """What tells one state of a file from another."""

    size: int
    mtime_ns: int


class Index(NamedTuple):
    """Where the rows stand: row i begins at byte starts_S[i] and ends before starts_S[i + 1], with blank lines after it.

    blanks_K holds for each blank line the number of rows before it, so that line numbers stay true. sha256 is that of the file.
    """

    starts_S: np.ndarray
    blanks_K: np.ndarray
    sha256: str

    def num_blanks_before(self, i: int) -> int:
        """How many blank lines stand before row i."""
        return int(np.searchsorted(self.blanks_K, i, side="right"))


def open_index(path: Path, data: mmap.mmap, stamp: Stamp) -> Index:
    """Maps the index of this state of the file, and builds it first if there is none.

    Args:
        path: The file.
        data: Its content.
        stamp: Its state; an index of another state is replaced.

    Raises:
        ValueError: Neither the file's folder nor the cache folder can be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    beside, of_user = path.with_name(f"{path.name}.idx"), cache / "omnilit" / "jsonl" / f"{digest}.idx"
    places = (beside, of_user)
    for place in places:
        index = _load_index(place, stamp)
        if index is not None:
            return index
    failures = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            sweep_abandoned(place.parent, f"{glob.escape(place.name)}.*-*.tmp" if place is beside else "*.idx.*-*.tmp")
            _write_index(place, data, stamp)
        except OSError as error:
            failures.append(f"{place} ({error.strerror})")
            continue
        index = _load_index(place, stamp)
        if index is None:
            raise ValueError(f"{path} was changed while it was indexed: wait until it is complete, and start again")
        return index
    raise ValueError(
        f"The index of {path} can be written nowhere, neither to {' nor to '.join(failures)}: "
        "set the environment variable XDG_CACHE_HOME to a folder that can be written"
    )


def _load_index(place: Path, stamp: Stamp) -> Index | None:
    try:
        file = place.open("rb")
    except OSError:  # missing, or of another user: built anew, here or in the cache folder
        return None
    with file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes < _HEADER_WORDS * _WORD.itemsize or num_bytes % _WORD.itemsize:
            return None
        words = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), _WORD)
    magic, version, size, mtime_ns, num_rows, num_blanks = (int(word) for word in words[:6])
    if (magic, version, Stamp(size, mtime_ns)) != (_MAGIC, _VERSION, stamp):
        return None
    if len(words) != _HEADER_WORDS + num_rows + 1 + num_blanks:
        return None
    starts_S, blanks_K = np.split(words[_HEADER_WORDS:], [num_rows + 1])
    return Index(starts_S, blanks_K, words[6:_HEADER_WORDS].tobytes().hex())


def _write_index(place: Path, data: mmap.mmap, stamp: Stamp) -> None:
    """Scans the file and writes its index under a temporary name, then renames it: two processes may do so at once."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    num_rows = 0
    blanks = [np.empty(0, _WORD)]
    try:
        with temporary.open("xb") as file:
            file.write(bytes(_HEADER_WORDS * _WORD.itemsize))
            for starts_R, blanks_K in _scan(data):
                file.write(starts_R.tobytes())
                blanks.append(blanks_K + np.uint64(num_rows))
                num_rows += len(starts_R)
            all_blanks_K = np.concatenate(blanks)
            file.write(np.array([stamp.size], _WORD).tobytes() + all_blanks_K.tobytes())
            file.seek(0)
            file.write(np.array([_MAGIC, _VERSION, *stamp, num_rows, len(all_blanks_K)], _WORD).tobytes())
            file.write(hashlib.sha256(data).digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _scan(data: mmap.mmap) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Finds the rows: for each block starts_R of its rows, and blanks_K, the rows before each of its blank lines."""
    bytes_ = np.frombuffer(data, np.uint8)
    may_be_blank = np.zeros(256, bool)  # by the first byte of a line: only such a line is looked at
    may_be_blank[list(b" \t\r\n\v\f" + BOM[:1])] = True
    for offset in range(0, len(bytes_), _BLOCK_BYTES):
        starts_L = np.flatnonzero(bytes_[offset : offset + _BLOCK_BYTES] == ord("\n")) + (offset + 1)
        if offset == 0:
            starts_L = np.concatenate([[0], starts_L])
        starts_L = starts_L[starts_L < len(bytes_)]
        is_blank_L = may_be_blank[bytes_[starts_L]]
        for line in np.flatnonzero(is_blank_L):
            start = int(starts_L[line])
            end = data.find(b"\n", start)
            is_blank_L[line] = not data[start : end if end >= 0 else len(data)].removeprefix(BOM).strip()
        blank_lines_K = np.flatnonzero(is_blank_L)
        blanks_K = blank_lines_K - np.arange(len(blank_lines_K))
        yield starts_L[~is_blank_L].astype(_WORD), blanks_K.astype(_WORD)
