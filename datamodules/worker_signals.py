"""Which signals a process that reads data obeys: those of the one that it reads for, and of nobody else."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

PATIENCE_SECONDS = 1.0
"""A worker that has not ended so long after it was told to hangs in code that gives no thread of Python a turn."""


class _Popen(Popen):
    def terminate(self) -> None:
        super().terminate()
        if self.wait(PATIENCE_SECONDS) is None:
            self.kill()


class _Worker(ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Popen:  # noqa: N802  # it is multiprocessing that calls it
        return _Popen(process_obj)


class WorkerContext(ForkContext):
    """Forks workers that are killed where they do not end when they are told to."""

    Process = _Worker


def worker_context(num_workers: int) -> WorkerContext | None:
    """The context of a `DataLoader` with so many workers; None: its own, where there are none, or they are not forked."""
    return WorkerContext() if num_workers and multiprocessing.get_start_method() == "fork" else None


def obey_owner_alone(worker: int) -> None:
    """Leaves alone what is sent to all processes of a run, as Ctrl-C does, and a scheduler: the one that trains is meant.

    That one ends its workers when it has come to its own end; without them it could not finish the step at hand.

    Args:
        worker: The number of the worker, which is told by the `DataLoader`.
    """
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":  # where it can be known who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        owner = multiprocessing.parent_process()
        assert owner is not None
        threading.Thread(target=_end_for, args=(owner.pid,), daemon=True).start()


def _end_for(owner: int | None) -> None:
    """Waits until a process sends SIGTERM, and ends this one, though it may be in the middle of decoding."""
    if sys.platform == "linux":
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != owner:
            pass
        os._exit(0)
