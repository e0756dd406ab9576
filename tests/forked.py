"""Functions run in forked processes, which find all that is imported here, so that they cost their own seconds alone."""

import os
import sys
from collections.abc import Callable
from typing import Any


def fork(act: Callable[[], Any]) -> int:
    """Starts a process that runs a function and ends: its number. An error is shown on stderr, and gives the exit code 1."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        try:
            act()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # noqa: BLE001  # whatever it is, the child must end here
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # there is one
        finally:
            sys.stderr.flush()
    finally:  # of the above too: a signal may raise within it, as that of a loader whose worker was killed does, and the child,
        os._exit(code)  # let out, would run the other tests


def in_child(act: Callable[[], Any]) -> int:
    """Runs a function in a process of its own: the exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(act), 0)[1])
