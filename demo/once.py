"""A folder that is made once: never seen half, made anew when what it is made from has changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock  # comes with torch

MANIFEST = "made_from.json"


def make_once(folder: Path, made_from: dict[str, Any], make: Callable[[Path], None]) -> bool:
    """Makes `folder` unless it was already made from the same things.

    The work is done under a temporary name and renamed, so that a process killed on the way leaves nothing that
    looks finished. Of two processes the second waits for the first.

    Args:
        folder: Where the result goes.
        made_from: What decides the result, as JSON; kept in the folder. A difference makes the folder anew.
        make: Fills the empty folder it is given.

    Returns:
        Whether it was made now.

    Raises:
        ValueError: The folder exists and was not made by this function.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        manifest = folder / MANIFEST
        if manifest.is_file() and json.loads(manifest.read_text()) == made_from:
            return False
        if folder.exists() and not manifest.is_file():
            raise ValueError(
                f"{folder} exists and holds something else (it has no {MANIFEST}): name another folder, or remove it"
            )
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        make(partial)
        (partial / MANIFEST).write_text(json.dumps(made_from, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        return True
