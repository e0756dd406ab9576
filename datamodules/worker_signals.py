"""Which signals a process that reads data obeys: those of the one that it reads for, and of nobody else."""

import os
import signal
import sys
import threading


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
        threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(owner: int) -> None:
    """Waits until a process sends SIGTERM, and ends this one, though it may be in the middle of decoding."""
    if sys.platform == "linux":
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != owner:
            pass
        os._exit(0)
