"""A processor as files: in a folder, such as that of a run, or as bytes inside a checkpoint."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DESCRIPTION = "processor.json"
"""The file that says what is not the tokenizer's; the others are as transformers writes them."""


def tokenizer_files(tokenizer: "PreTrainedTokenizerFast") -> dict[str, bytes]:
    """The files of a tokenizer, by name."""
    with tempfile.TemporaryDirectory(prefix="omnilit-") as folder:
        tokenizer.save_pretrained(folder)
        return read_files(Path(folder))


def read_files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their path in it; hidden ones are leftovers of a write that was stopped."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=str)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a folder, each under a temporary name first, `DESCRIPTION` last.

    Raises:
        ValueError: One of them would come to lie outside the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".file.tmp"  # the same each time: what a kill leaves of it, the next write takes up
    try:
        for name in sorted(files, key=lambda name: name == DESCRIPTION):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"the processor has a file {name!r}, which is no path inside a folder: it was tampered with")
            temporary.write_bytes(files[name])
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(folder / path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def as_folder(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder with these files, for as long as the context lasts.

    Raises:
        ValueError: One of them would come to lie outside the folder.
    """
    with tempfile.TemporaryDirectory(prefix="omnilit-") as folder:
        write_files(Path(folder), files)
        yield Path(folder)
