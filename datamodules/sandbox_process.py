"""The process in which media are decoded: it may crash, hang or run out of memory without harm to who asked.

It is started by `Sandbox`, imports no torch, and ends with whoever started it.
"""

import json
import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType

from datamodules.sandbox_wire import receive, send, send_result
from datamodules.sources import MediaError


def serve(link: socket.socket) -> None:
    """Does what is asked for, one thing after the other, until enough memory is lost that a new process is better.

    Args:
        link: To who asks. A request is a pickled function, its arguments, and how many seconds and bytes it may take.
    """
    at_start = _address_space()
    send(link, b"{}")
    while True:
        try:
            request = receive(link)
        except (EOFError, ConnectionError):  # who asked has ended
            return
        function, args, max_seconds, max_bytes = pickle.loads(request)
        _limit_memory(at_start + max_bytes)
        signal.setitimer(signal.ITIMER_REAL, max_seconds)  # nobody handles it, so that it ends the process, whatever it does
        with _Telling(link):
            try:
                result = function(*args)
            except MediaError as error:
                send(link, json.dumps({"wrong": str(error), "is_memory": isinstance(error.__cause__, MemoryError)}).encode())
            else:
                send_result(link, result)
                del result
        signal.setitimer(signal.ITIMER_REAL, 0)
        if _address_space() > at_start + max_bytes / 2:
            return


class _Telling:
    """Says which error ends this process, one that nobody expected."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            head = {"failed": f"{kind.__name__}: {error}", "is_memory": issubclass(kind, MemoryError)}
            send(self.link, json.dumps(head).encode())


def _address_space() -> int:
    """Bytes of address space; 0 where the system does not say, and then there is no limit on them either."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()


def _limit_memory(num_bytes: int) -> None:
    if sys.platform == "linux":
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes if most == resource.RLIM_INFINITY else min(num_bytes, most), most))


def _end_with_owner(link: socket.socket) -> None:
    """Waits until the other end of the link is closed, as it is when the process that holds it ends, however it does."""
    poll = select.poll()
    poll.register(link, 0)  # a hang-up is always told
    poll.poll()
    os._exit(0)


def main() -> None:
    """Serves the socket whose number is the argument."""
    link = socket.socket(fileno=int(sys.argv[1]))
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # Ctrl-C and SLURM send them to all processes of a run
        signal.signal(signum, signal.SIG_IGN)  # who asked is meant, and ends this one with itself
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    threading.Thread(target=_end_with_owner, args=(link,), daemon=True).start()
    serve(link)


if __name__ == "__main__":
    main()
