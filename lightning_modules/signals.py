"""Signals that ask a run to save or to stop: noted when they come, obeyed between two steps by all processes together."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

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
    def requeue(self) -> Callable[[int, FrameType | None], Any] | None:
        """Lightning's handler of SIGUSR1, where it runs in a SLURM job: it saves, and puts the job back into the queue."""
        before = self._before.get(signal.SIGUSR1)
        return before if callable(before) else None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._interrupted:
            self.restore()
            raise StoppedBySignal(signum)
        self._interrupted = self._interrupted or signum == signal.SIGINT
        self.noted = max(self.noted, signum)
