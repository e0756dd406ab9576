"""One run at a time in a folder: a lock that the system takes back from a process that ends, however it ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

LOCK = ".lock"
"""The file of the lock, in the run folder. It stays there: one that is removed and made anew could be locked twice."""
WAIT_S = 5.0
NUM_WAITS = 36
"""Three minutes: an NFS server keeps the locks of a machine that has failed for its lease, most often a minute and a half."""
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """The lock on a run folder, held by one process: that of rank 0.

    Other machines see it on a network disk (NFS, Lustre with `flock`). On Linux it is a lock of the open file, which the process
    may read and close otherwise, as who uploads the folder does; elsewhere a POSIX record lock, which that would release. A
    process that is forked from the holder does not hold it, so that loader workers that outlive a run which was killed keep
    nobody out.
    """

    _held: ClassVar[dict[Path, "RunLock"]] = {}

    def __init__(self) -> None:
        self._taken: tuple[Path, int] | None = None

    def take(self, folder: Path, pause: Callable[[float], None] = time.sleep) -> None:
        """Takes the lock, and writes down who has it; on a disk without locks there is a warning, and none is taken.

        A process on another machine may have ended with it: that one is waited for. One that this process has, by a fit that
        failed, is given back first.

        Args:
            folder: The run folder.
            pause: Waits for some seconds.

        Raises:
            ValueError: Another process has it.
            OSError: The folder cannot be written.
        """
        self.release()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOCK
        file = path.resolve()
        if file in self._held:
            self._held[file].release()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # it is another's, who did it
                os.fchmod(descriptor, 0o666)  # whoever may write the folder may go on with the run, whatever the umask
            _lock_or_wait(descriptor, folder, pause)
        except OSError as error:
            _, holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno in _TAKEN:
                raise ValueError(
                    f"{folder} is in use: {holder} has it. Wait for its end, or give another folder with "
                    f"--trainer.default_root_dir. If its machine is gone, so that it cannot end, delete {path}"
                ) from error
            rank_zero_warn(f"{folder} is on a disk without locks ({error.strerror}): see to it that no other run uses the folder")
            return
        self._taken = file, descriptor
        self._held[file] = self
        os.register_at_fork(after_in_child=self.release)  # the lock is that of all processes that have the file open
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # on a full disk the lock holds, too; who has it is only told
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode(), 0)
            os.fsync(descriptor)  # other machines read it, too

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._taken is not None:
            file, descriptor = self._taken
            os.close(descriptor)
            del self._held[file]
            self._taken = None


def _lock_or_wait(descriptor: int, folder: Path, pause: Callable[[float], None]) -> None:
    for waits in range(NUM_WAITS + 1):
        try:
            _lock(descriptor)
            return
        except OSError as error:
            host, holder = _holder(descriptor)
            if error.errno not in _TAKEN or host in ("", socket.gethostname()) or waits == NUM_WAITS:
                raise
        if waits == 0:
            rank_zero_info(f"{folder}: {holder} has it; waiting {NUM_WAITS * WAIT_S:.0f} s, in case that its machine has failed")
        pause(WAIT_S)


def _lock(descriptor: int) -> None:
    if sys.platform == "linux":  # a struct flock of 64 bits: the whole file
        whole = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(descriptor: int) -> tuple[str, str]:
    """Who has the lock: the machine, and all in words."""
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
        return told["host"], f"process {told['pid']} on {told['host']}, since {told['since']},"
    except (OSError, ValueError, KeyError, TypeError):  # it was taken just now, or on a full disk
        return "", "another process"
