"""Decoding in a process of its own, so that a file that crashes, hangs or fills its decoder costs one row and not the run.

Each process that decodes (a loader worker, or the one that trains where there are none) has one such process. It is a new
interpreter and no fork: what was opened, locked or allocated before stays out of it.
"""

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from datamodules.call import P, T
from datamodules.sandbox_wire import receive, receive_result, send
from datamodules.sources import MediaError

_START_SECONDS = 300.0
"""A new interpreter takes 0.3 seconds, and far longer where libraries come from a slow network disk."""

_GRACE_SECONDS = 5.0
"""The process ends itself when its time is up; if it cannot (it waits for a disk), it is ended so much later."""


_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
"""One thread; and glibc keeps the memory of a picture for the next one, which halves the time of large ones."""


@dataclass(frozen=True)
class Isolated:
    """Calls functions in the sandbox of this process; the same result comes back, bit for bit.

    Args:
        name: Of the medium, for errors.
        option: The limits of its modality, for errors.
        max_seconds: How long a call may take.
        max_bytes: How much memory it may take.
    """

    name: str
    option: str
    max_seconds: float
    max_bytes: int

    def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a function of a module gives: a picture, a tuple of numbers, or one of the dataclasses of the data side.

        Args:
            function: A function that can be imported.
            args: Its arguments.
            kwargs: None; arguments are given by their places.

        Raises:
            MediaError: The function raised it, or any other error; or its process ended, or took too long or too much.
            ValueError: There can be no sandbox.
        """
        assert not kwargs
        return _sandbox().run(self, pickle.dumps((function, args, self.max_seconds, self.max_bytes)))

    def error(self, exit_code: int) -> MediaError:
        """What the end of the process means for the medium."""
        if exit_code == -signal.SIGALRM:
            return MediaError(
                f"{self.name} took longer than {self.option}.max_decode_seconds = {self.max_seconds:g} to read: it is "
                "damaged and hangs its decoder, or the option is too low for such files on this machine"
            )
        how = f"by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit code {exit_code}"
        return MediaError(f"{self.name} crashes its decoder: the process that read it ended {how}")

    def memory_error(self) -> MediaError:
        """The medium needs more memory than it may take."""
        return MediaError(
            f"{self.name} needs more than {self.option}.max_memory_bytes = {self.max_bytes:,} to be read: it is damaged, or the "
            "option is too low for such files"
        )


@dataclass(frozen=True)
class _Link:
    """A process that waits for requests, and the socket to it."""

    process: subprocess.Popen[bytes]
    socket: socket.socket

    def end(self) -> int:
        """Ends the process if it has not ended, and returns its exit code."""
        self.socket.close()
        self.process.kill()
        return self.process.wait()


class Sandbox:
    """The process of this process in which media are decoded; started when it is needed, and anew after it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._ends_with_owner = False
        os.register_at_fork(after_in_child=self._forget)

    def run(self, call: Isolated, request: bytes) -> Any:
        """What a request gives.

        A process that has decoded before may owe its end to an earlier file, so that the request is made once more in a new one.

        Args:
            call: Its limits.
            request: A pickled function, its arguments and limits.

        Raises:
            MediaError: See `Isolated`.
            ValueError: The process cannot be started.
        """
        with self._lock:
            link, self._link = self._link, None  # until it has answered: a call that is interrupted leaves none behind
            if link is not None:
                with contextlib.suppress(_EndedError):
                    return self._ask(link, call, request)
            try:
                return self._ask(self._start(), call, request)
            except _EndedError as ended:
                raise call.error(ended.exit_code) from ended

    def _ask(self, link: _Link, call: Isolated, request: bytes) -> Any:
        try:
            link.socket.settimeout(call.max_seconds + _GRACE_SECONDS)
            send(link.socket, request)
            head = json.loads(receive(link.socket))
            result = receive_result(link.socket, head) if "kind" in head else None
        except TimeoutError as error:
            link.end()
            raise call.error(-signal.SIGALRM) from error
        except (EOFError, ConnectionError) as error:
            link.process.wait()
            exit_code = link.end()
            if exit_code == -signal.SIGALRM:  # its time was its own, whatever it had read before
                raise call.error(exit_code) from error
            raise _EndedError(exit_code) from error
        if "failed" in head:
            with contextlib.suppress(subprocess.TimeoutExpired):
                link.process.wait(_GRACE_SECONDS)  # it prints where the error came from
            link.end()
        else:
            self._link = link
        if head.get("is_memory"):
            raise call.memory_error()
        if "kind" not in head:
            raise MediaError(head.get("wrong") or f"{call.name} makes its decoder fail: {head['failed']}")
        return result

    def _start(self) -> _Link:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parents[1])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "datamodules.sandbox_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for who waits for it
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": paths},
            )
        link = _Link(process, ours)
        if not self._ends_with_owner:
            Finalize(None, self._end, exitpriority=0)  # unlike atexit, also in processes of multiprocessing
            self._ends_with_owner = True
        ours.settimeout(_START_SECONDS)
        try:
            receive(ours)
        except (EOFError, OSError) as error:
            raise ValueError(
                f"the process that decodes media cannot be started: it ended with exit code {link.end()}, and its error is "
                "above; limits.isolate: false decodes without it"
            ) from error
        return link

    def _forget(self) -> None:
        """In a process that was forked: the sandbox is that of the parent."""
        if self._link is not None:
            self._link.socket.close()
        self._lock, self._link, self._ends_with_owner = threading.Lock(), None, False

    def _end(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.end()


class _EndedError(Exception):
    """The process ended before it answered."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@cache
def _sandbox() -> Sandbox:
    return Sandbox()
