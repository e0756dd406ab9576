import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import pytest

from datamodules import worker_signals
from datamodules.worker_signals import WorkerContext, obey_owner_alone, worker_context
from tests.forked import in_child


def hang(begun: Connection) -> None:
    """As in a decoder that gives no thread of Python a turn: nothing hears SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    begun.send(os.getpid())
    signal.pause()


def wait(begun: Connection) -> None:
    obey_owner_alone(0)
    begun.send(os.getpid())
    signal.pause()


def start(target: object) -> multiprocessing.context.ForkProcess:
    here, there = multiprocessing.Pipe(duplex=False)
    worker = WorkerContext().Process(target=target, args=(there,), daemon=True)
    worker.start()
    assert here.recv() == worker.pid
    return worker


def test_a_worker_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_signals, "PATIENCE_SECONDS", 0.1)
    worker = start(hang)
    worker.terminate()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL


def test_a_worker_ends_for_its_owner_and_for_nobody_else() -> None:
    worker = start(wait)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        assert in_child(lambda signum=signum: os.kill(worker.pid, signum)) == 0
    worker.join(0.2)
    assert worker.is_alive()
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0


def test_no_context_without_workers() -> None:
    assert worker_context(0) is None and isinstance(worker_context(1), WorkerContext)
