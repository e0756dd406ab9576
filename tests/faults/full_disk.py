"""A disk without room."""

import errno
import io
import os
from pathlib import Path
from typing import Any

from lightning_modules.checkpoints import CheckpointFile


class FullAt(CheckpointFile):
    """A disk that is full while some steps are saved."""

    steps: frozenset[int] = frozenset({2})
    _step = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._step = checkpoint["global_step"]
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def open(self, path: Path) -> io.RawIOBase:
        if self._step in self.steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().open(path)
