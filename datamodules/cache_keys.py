"""What a cached tensor depends on, as one key: the bytes of the files, the settings, the code, the versions of libraries."""

import ast
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import sysconfig
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from torch import Tensor

from datamodules.batch import Modality
from datamodules.cache import TensorCache
from datamodules.content import Media
from datamodules.media import MediaLimits
from datamodules.sources import FileState, MediaRoot, find_file

LIBRARIES = ("torch", "torchaudio", "transformers", "timm", "numpy", "pillow", "decord", "av", "soundfile")
"""What decodes, transforms and encodes."""

SETTLED_SECONDS = 2.0
"""A file that changed less long ago may change again without a new time: clocks of file systems are coarse."""

BIG_BYTES = 4_000_000
"""From here on to look a hash up costs less than to compute it."""


def hash_of(*parts: Any) -> str:
    """A key of 32 hexadecimal digits for values that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def media_settings(modality: Modality, transform: Any, limits: MediaLimits) -> str:
    """A hash of all that makes a decoded and transformed medium besides its bytes.

    Raises:
        ValueError: The settings of the transform cannot be read.
    """
    own_limits = dataclasses.asdict(limits)[modality]
    code = code_of("datamodules.media", *sorted(_modules(transform)))
    return hash_of(modality, describe(transform), own_limits, code, versions())


def describe(value: Any) -> Any:
    """A value with all its settings, as JSON.

    Raises:
        ValueError: It holds something whose settings cannot be read.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [describe(item) for item in value]
        case Mapping():
            return [[describe(key), describe(item)] for key, item in value.items()]
        case FunctionType() | type() if isinstance(value, type) or value.__closure__ is None:
            return f"{value.__module__}.{value.__qualname__}"
        case np.ndarray() | Tensor():
            array = np.ascontiguousarray(value)
            return [str(array.dtype), list(array.shape), hashlib.blake2b(array.tobytes()).hexdigest()]
    if dataclasses.is_dataclass(value):
        fields = {field.name: describe(vars(value)[field.name]) for field in dataclasses.fields(value)}
        return [describe(type(value)), fields]
    kind = value.__qualname__ if isinstance(value, FunctionType) else describe(type(value))
    raise ValueError(
        f"nothing can be cached of what {kind} makes, since its settings cannot be read: make it a dataclass whose fields are "
        "its options, or set the cache to null"
    )


def _modules(value: Any) -> set[str]:
    """Where the code of a function, a class, or a dataclass and what is in its fields stands."""
    if isinstance(value, FunctionType | type):
        return {value.__module__}
    if not dataclasses.is_dataclass(value):
        return set()
    own = {kind.__module__ for kind in inspect.getmro(type(value))}
    return own.union(*(_modules(vars(value)[field.name]) for field in dataclasses.fields(value)))


@cache
def code_of(*modules: str) -> str:
    """A hash of the source of modules, and of those of ours that they import; libraries have versions.

    Raises:
        ValueError: One of them has no file, such as a notebook.
    """
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = None if name in found else _own_file(name)
        if path is not None:
            source = path.read_text(encoding="utf-8")
            found[name] = source
            waiting += _imported(ast.parse(source), name, is_package=path.name == "__init__.py")
    return hash_of(found)


def _own_file(module: str) -> Path | None:
    """The source of a module that is neither installed nor of Python itself."""
    if module == "__main__":
        raise ValueError(
            "nothing can be cached of what a class in the running script or notebook makes, since a change of it would go "
            "unnoticed: move the class into a module of its own, or set the cache to null"
        )
    try:
        top = importlib.util.find_spec(module.partition(".")[0])
        if top is None or top.origin in (None, "built-in", "frozen") or _is_installed(str(top.origin)):
            return None
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a class, or something else in a module
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None and spec.origin.endswith(".py") else None


def _is_installed(origin: str) -> bool:
    paths = sysconfig.get_paths()
    return any(Path(origin).is_relative_to(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _imported(tree: ast.Module, module: str, is_package: bool) -> list[str]:
    """What a module imports, anywhere in it; `from a import b` may mean the module `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            names += [str(start), *(f"{start}.{alias.name}" for alias in node.names)]
    return names


@cache
def versions() -> str:
    """The installed versions of `LIBRARIES`."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


class ContentHash:
    """Hashes of the bytes of media; a file is read once as long as it stays as it is.

    A file stays as it is while neither its size nor its times change; the time of its last change of state (ctime) cannot be
    set back, as that of its content can.

    Args:
        known: Keeps the hashes of big files for other processes.
    """

    def __init__(self, known: TensorCache) -> None:
        self.known = known
        self._hashes: dict[FileState, str] = {}

    def __call__(self, medium: Media, files: Iterable[FileState | None]) -> str:
        """The hash of what a row names: of all bytes, and of the part of them that it takes.

        Args:
            medium: What the row names.
            files: Its files, as `states` gives them.

        Raises:
            OSError: A file cannot be read.
        """
        sources = [source if state is None else self._hash(state) for source, state in zip(medium.files, files, strict=True)]
        return hash_of(medium.modality, sources, medium.start, medium.end, medium.fps)

    @staticmethod
    def states(medium: Media, media_root: MediaRoot) -> list[FileState | None]:
        """The files of a medium as they are now; None for a `data:` URI.

        Raises:
            MediaError: One cannot be found.
        """
        return [find_file(source, media_root) for source in medium.files]

    def _hash(self, state: FileState) -> str:
        if state in self._hashes:
            return self._hashes[state]
        key = hash_of("file", str(state.path), *state[1:])
        entry = self.known.get(key) if state.num_bytes >= BIG_BYTES else None
        if entry is not None:
            found = bytes(entry.tensor.tolist()).hex()
        else:
            with state.path.open("rb") as file:
                found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if abs(time.time_ns() - state.changed_ns) > 1e9 * SETTLED_SECONDS:
            self._hashes[state] = found
            if entry is None and state.num_bytes >= BIG_BYTES:
                self.known.put(key, Tensor(list(bytes.fromhex(found))).byte())
        return found
