"""Signals that ask a run to save or to stop: noted when they come, obeyed between two steps by all processes together."""

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""In this order of precedence where several have come: the number decides, which grows."""


class StoppedBySignal(SIGTERMException):
    """Ends the program with the exit code that shells give for a signal: 143 for SIGTERM, 130 for SIGINT."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


class Signals:
    """Notes the signals of this process while a fit trains.

    What Lightning does on them it does at once, wherever the process is: in the middle of an update, or of an exchange with other
    processes. A second SIGINT still ends the program at once.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self.noted = 0
        self._interrupted = False

    def listen(self) -> None:
        """Begins to note them, after Lightning has set its own handlers."""
        if not self._before and threading.current_thread() is threading.main_thread():
            self.noted, self._interrupted = 0, False
            self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def restore(self) -> None:
        """Brings back the handlers from before."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def agreed(self, trainer: Trainer) -> int:
        """The signal that some process has noted since this was asked last, 0 for none; all processes must meet here."""
        noted, self.noted = self.noted, 0
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            noted = int(trainer.strategy.reduce(torch.tensor(noted, device=device), reduce_op="max"))
        return noted

    @property
    def requeues(self) -> bool:
        """Whether SIGUSR1 is to put a SLURM job back into the queue: there Lightning has a handler of it, unless told not to."""
        return callable(self._before.get(signal.SIGUSR1))

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._interrupted:
            self.restore()
            raise StoppedBySignal(signum)
        self._interrupted = self._interrupted or signum == signal.SIGINT
        self.noted = max(self.noted, signum)


def requeue() -> None:
    """Puts the SLURM job of this process back into the queue, by the number that `scontrol` knows it by.

    Lightning's handler does that too, but first it saves, under a name of its own, and where it cannot it does no more.
    """
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        rank_zero_warn(f"SLURM did not put job {job} back into the queue: {done.stderr.strip()}. Start it again by hand")
    else:
        rank_zero_info(f"job {job} is back in the queue")
