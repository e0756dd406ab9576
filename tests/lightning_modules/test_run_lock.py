"""Who may train in a folder: one process, and nobody else until it has ended."""

import errno
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_modules.run_lock import LOCK, NUM_WAITS, RunLock
from tests.forked import fork, in_child


def holder(folder: Path, meanwhile: Callable[[], None] = lambda: None) -> int:
    """A process that has the lock, until it is killed; first it does something else, too."""
    ready = os.pipe()

    def act() -> None:
        RunLock().take(folder)
        meanwhile()
        os.write(ready[1], b"x")
        time.sleep(60)

    child = fork(act)
    os.close(ready[1])
    assert os.read(ready[0], 1)
    return child


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def may_train(folder: Path) -> bool:
    return in_child(lambda: RunLock().take(folder)) == 0


def test_it_is_said_who_trains(tmp_path: Path) -> None:
    folder = tmp_path / "runs/new"
    other = holder(folder)
    now = time.strftime("%Y-%m-%d %H:")
    with pytest.raises(ValueError, match=rf"new is in use: process {other} on {re.escape(socket.gethostname())}, since {now}"):
        RunLock().take(folder)
    kill(other)
    lock = RunLock()
    lock.take(folder)
    assert not may_train(folder)
    lock.release()
    assert may_train(folder) and [file.name for file in folder.iterdir()] == [LOCK]


def test_workers_of_a_run_that_was_killed_keep_nobody_out(tmp_path: Path) -> None:
    workers = tmp_path / "workers"

    def start() -> None:
        workers.write_text(str(fork(lambda: time.sleep(60))))

    kill(holder(tmp_path, start))
    worker = int(workers.read_text())
    assert may_train(tmp_path)
    os.kill(worker, signal.SIGKILL)  # it was alive


def test_a_process_may_read_its_lock_file(tmp_path: Path) -> None:
    """As do loggers that upload the run folder."""
    other = holder(tmp_path, lambda: [(tmp_path / LOCK).read_bytes() for _ in range(2)])
    assert not may_train(tmp_path)
    kill(other)
    assert may_train(tmp_path)


@pytest.mark.parametrize("end_after", [3, NUM_WAITS + 1])
def test_another_machine_may_have_failed_and_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end_after: int
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "node-7")
        other = holder(tmp_path)
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == end_after:
            kill(other)

    if end_after == 3:
        RunLock().take(tmp_path, pause)
        assert len(waits) == 3 and not may_train(tmp_path)
        return
    with pytest.raises(ValueError, match=rf"in use: process {other} on node-7, since .*, has it"):
        RunLock().take(tmp_path, pause)
    assert sum(waits) == 180
    kill(other)


def test_a_process_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    other, waits = holder(tmp_path), list[float]()
    with pytest.raises(ValueError, match="is in use"):
        RunLock().take(tmp_path, waits.append)
    assert not waits
    kill(other)


def test_whoever_may_write_the_folder_may_lock_it(tmp_path: Path) -> None:
    usual = os.umask(0o077)
    try:
        RunLock().take(tmp_path)
    finally:
        os.umask(usual)
    assert (tmp_path / LOCK).stat().st_mode & 0o777 == 0o666


def test_a_lock_is_taken_anew_by_a_second_fit_of_a_process(tmp_path: Path) -> None:
    """The first has failed, and never gave it back."""
    RunLock().take(tmp_path)
    second = RunLock()
    second.take(tmp_path)
    assert not may_train(tmp_path)
    second.release()
    assert may_train(tmp_path)


def test_a_lock_that_went_to_another_folder_stays_there(tmp_path: Path) -> None:
    lock = RunLock()
    lock.take(tmp_path / "a")
    lock.take(tmp_path / "b")
    RunLock().take(tmp_path / "a")
    assert not may_train(tmp_path / "a") and not may_train(tmp_path / "b")


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("lightning_modules.run_lock._lock", refuse)
    with pytest.warns(UserWarning, match=r"on a disk without locks \(No locks available\)"):
        RunLock().take(tmp_path)


def test_it_holds_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", refuse)
    other = holder(tmp_path)
    with pytest.raises(ValueError, match="is in use: another process has it"):
        RunLock().take(tmp_path)
    kill(other)
