"""What stands beside each checkpoint: sizes and hashes of its files, so that one that is cut off or changed is never taken.

A checkpoint is a file or a folder of files (shards). It is written under a temporary name; then its manifest is, too; then both
are renamed, the manifest last. A kill between the two leaves a new checkpoint beside an old manifest and the temporary name of
its own, and either of the two may say that it is whole.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

SUFFIX = ".manifest.json"
_UNNAMED = f".*{SUFFIX}*.tmp"


class FileSum(NamedTuple):
    """Size and SHA-256 of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Args:
        step: Optimizer steps that it holds.
        files: Its files, by their path in the folder in which the checkpoint lies.
        wandb_run_id: The W&B run that it belongs to; None: there is none.
        written_ns: When, in nanoseconds of the epoch; behind those that the run has written before, whatever the clock says.
    """

    step: int
    files: dict[str, FileSum]
    wandb_run_id: str | None = None
    written_ns: int = field(default_factory=time.time_ns)


class Newest(NamedTuple):
    """The newest whole checkpoint, and which newer ones were left, and why, in words."""

    path: Path
    manifest: Manifest
    left: list[str]


class HashingWriter(io.BufferedWriter):
    """A buffered file that adds up what is written to it."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def write(self, data: Any) -> int:
        """Writes, and adds up."""
        self._hash.update(data)
        self._num_bytes += len(data)
        return super().write(data)

    def sum(self) -> FileSum:
        """Of all that was written so far."""
        return FileSum(self._num_bytes, self._hash.hexdigest())


def temporary_name(path: Path) -> Path:
    """Where a checkpoint or a manifest is written before it gets its name: another file each time, which no other run writes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def manifest_path(path: Path) -> Path:
    """Where the manifest of a checkpoint is."""
    return path.with_name(path.name + SUFFIX)


def manifested(file: Path) -> Path:
    """The checkpoint of a manifest, which has its name or not yet."""
    return file.with_name(re.sub(r"^\.?(.*)\.manifest\.json(\..*)?$", r"\1", file.name))


def file_sums(path: Path, name: str) -> dict[str, FileSum]:
    """Sizes and hashes of a file, or of all files of a folder, as a manifest has them.

    Args:
        path: The file or folder.
        name: What it is called in the manifest.
    """
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return {f"{name}/{file.relative_to(path).as_posix()}": _file_sum(file) for file in inside}
    return {name: _file_sum(path)}


def publish(temporary: Path, path: Path, manifest: Manifest) -> None:
    """Gives a checkpoint that was written and fsynced under its temporary name its own, with its manifest.

    Raises:
        OSError: The disk fails. What stood there before, if anything, stands there still, or the new one does.
    """
    described = manifest_path(path)
    new = temporary_name(described)
    manifest = replace(manifest, written_ns=max(manifest.written_ns, _last_written_ns(path.parent) + 1))
    try:
        with new.open("w", encoding="utf-8") as file:
            files = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in manifest.files.items()}
            json.dump({**asdict(manifest), "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
        new.replace(described)
    except OSError:
        if temporary.exists():  # or it has its name already, and needs the manifest that has not
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    _remove(_aside(path))


def _rename(temporary: Path, path: Path) -> None:
    in_the_way = path.exists() and (path.is_dir() or temporary.is_dir())  # neither replaces the other, nor what is in a folder
    if in_the_way:
        path.replace(_aside(path))
    try:
        temporary.replace(path)
    except OSError:
        if not (in_the_way and path.exists()):
            raise
        path.replace(_aside(path))  # `newest`, in another command, has just put it back
        temporary.replace(path)


def copy(source: Path, path: Path) -> None:
    """Gives a whole checkpoint a second name, in the place of the one that stands there.

    Raises:
        OSError: The disk is full, or fails.
    """
    manifest, temporary = read_manifest(source), temporary_name(path)
    assert manifest is not None
    try:
        if source.is_dir():
            shutil.copytree(source, temporary)
        else:
            shutil.copyfile(source, temporary)
        for file in (file for file in (temporary, *temporary.rglob("*")) if file.is_file()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        publish(temporary, path, Manifest(manifest.step, file_sums(temporary, path.name), manifest.wandb_run_id))
    except OSError:
        discard(temporary)
        raise


def discard(temporary: Path) -> None:
    """Takes away what was written for a checkpoint that could not be finished."""
    with contextlib.suppress(OSError):
        _remove(temporary)


def read_manifest(path: Path) -> Manifest | None:
    """The manifest that fits a checkpoint; None: it has none, or its files are not what any says."""
    return next((manifest for manifest in _manifests(path) if not _difference(path, manifest)), None)


def fault(path: Path) -> str:
    """What is wrong with the files of a checkpoint, in words; empty where its manifest fits, or it has none."""
    differences = [_difference(path, manifest) for manifest in _manifests(path)]
    return "" if "" in differences or not differences else differences[0]


def newest(folders: Iterable[Path]) -> Newest | None:
    """The checkpoint of those in some folders that was written last and is whole; None: none is.

    Raises:
        ValueError: There are manifests, and none of their checkpoints is whole.
    """
    found: list[tuple[int, int, Path, Manifest]] = []
    for folder in folders:
        for old in folder.glob(".*.ckpt.old"):  # killed between the renaming of an old folder and that of a new one
            # also where another process does the same; one that is saving just now does it anew
            with contextlib.suppress(OSError):
                old.rename(folder / old.name[1 : -len(".old")])
        for path in {manifested(file) for pattern in (f"*{SUFFIX}", _UNNAMED) for file in folder.glob(pattern)}:
            found += [(manifest.written_ns, manifest.step, path, manifest) for manifest in _manifests(path) if path.exists()]
    left: dict[Path, str] = {}
    for *_, path, manifest in sorted(found, key=lambda entry: entry[:3], reverse=True):
        if not _difference(path, manifest):
            return Newest(path, manifest, [f"{path.name}: {why}" for path, why in left.items()])
        if problem := fault(path):  # or it is whole, and this manifest that of one that was never renamed: no older than that
            left[path] = problem
    if left:
        named = "; ".join(f"{path}: {why}" for path, why in left.items())
        raise ValueError(f"no checkpoint is whole ({named}). Start anew in another folder, or bring one back from a copy")
    return None


def sweep(folder: Path) -> None:
    """Takes away what a run that was killed while it saved has left in a folder: names that `publish` gives, and no others."""
    for file in folder.glob(_UNNAMED):
        path, manifest = manifested(file), _read(file)
        if manifest is not None and path.exists() and not _difference(path, manifest):
            file.replace(manifest_path(path))
        else:
            file.unlink(missing_ok=True)
    for leftover in (*folder.glob(".*.ckpt*.tmp"), *folder.glob(".*.ckpt.old")):
        _remove(leftover)
    for file in folder.glob(f"*{SUFFIX}"):
        if not manifested(file).exists():
            file.unlink(missing_ok=True)


def _last_written_ns(folder: Path) -> int:
    """When the newest checkpoint of a run was written, by the clock of its machine, which may go before that of this one."""
    files = (*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}"), *folder.parent.glob(f"*{SUFFIX}"))
    return max((manifest.written_ns for file in files if (manifest := _read(file)) is not None), default=0)


def _manifests(path: Path) -> list[Manifest]:
    files = (manifest_path(path), *path.parent.glob(f".{glob.escape(path.name)}{SUFFIX}*.tmp"))
    return [manifest for file in files if (manifest := _read(file)) is not None]


def _read(file: Path) -> Manifest | None:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        files = {name: FileSum(sums["bytes"], sums["sha256"]) for name, sums in told["files"].items()}
        return Manifest(told["step"], files, told["wandb_run_id"], told["written_ns"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one whose writer was killed in it
        return None


def _difference(path: Path, manifest: Manifest) -> str:
    for name, expected in manifest.files.items():
        file = path.parent / name
        what = "it" if file == path else name
        if not file.is_file():
            return f"{what} is missing"
        if (size := file.stat().st_size) != expected.num_bytes:
            return f"{what} has {size:,} of {expected.num_bytes:,} bytes"
        if _file_sum(file).sha256 != expected.sha256:
            return "its SHA-256 differs" if file == path else f"the SHA-256 of {name} differs"
    return ""


def _file_sum(file: Path) -> FileSum:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
    return FileSum(file.stat().st_size, digest.hexdigest())


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
