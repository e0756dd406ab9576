"""One run at a time in a folder: a lock that the system takes back from a process that ends, however it ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

LOCK = ".lock"
"""The file of the lock, in the run folder. It stays there: one that is removed and made anew could be locked twice."""


class RunLock:
    """The lock on a run folder, held by one process: that of rank 0.

    It is a POSIX record lock. Other machines see it on a network disk (NFS, Lustre with `flock`). A process that is forked from
    the holder does not hold it, so that loader workers that outlive a run which was killed keep nobody out. The holder must not
    open the file a second time: to close it again would release the lock.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, folder: Path) -> None:
        """Takes the lock, and writes down who has it; on a disk without locks there is a warning, and none is taken.

        Raises:
            ValueError: Another process has it.
            OSError: The folder cannot be written.
        """
        self.release()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        self._descriptor = descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            self.release()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{folder} is in use: {holder} trains in it. Wait for its end, or give another folder with "
                    f"--trainer.default_root_dir. If its machine is gone, so that it cannot end, delete {path}"
                ) from error
            rank_zero_warn(f"{folder} is on a disk without locks ({error.strerror}): see to it that no other run uses the folder")
            return
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # on a full disk the lock holds, too; who has it is only told
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode(), 0)
            os.fsync(descriptor)  # other machines read it, too

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _holder(descriptor: int) -> str:
    """Who has the lock, in words."""
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {told['pid']} on {told['host']}, since {told['since']},"
    except (OSError, ValueError, KeyError, TypeError):  # it was taken just now, or on a full disk
        return "another process"
