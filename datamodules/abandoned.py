"""Files that a writer has begun under a temporary name, and was killed before it gave them their own."""

import contextlib
import os
import time
from pathlib import Path

ABANDONED_SECONDS = 3600
"""An unfinished file to which nothing was written for so long belongs to a writer that was killed."""


def is_abandoned(status: os.stat_result) -> bool:
    """Whether an unfinished file is so old; others may be at work in the same folder, on this machine or another."""
    return time.time() - status.st_mtime > ABANDONED_SECONDS


def sweep_abandoned(folder: Path, pattern: str) -> None:
    """Deletes the abandoned files of a folder; what cannot be deleted stays.

    Args:
        folder: Where writers work.
        pattern: Of the temporary names that they give, and no other file has.
    """
    for file in folder.glob(pattern):
        with contextlib.suppress(OSError):  # deleted meanwhile, or of another user
            if is_abandoned(file.stat()):
                file.unlink()
