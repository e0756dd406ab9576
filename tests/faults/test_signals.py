"""A run that is told to stop stops within one step, with a checkpoint, on all processes, and goes on as if it had not."""

import os
import signal
import time
from ast import literal_eval
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_modules.checkpoints import RunCheckpoint
from models.manifest import read_manifest
from tests.faults.full_disk import FullAt
from tests.faults.small_runs import end_state, fit, make_module, same
from tests.forked import in_child
from tests.lightning_modules.processes import in_two_processes
from tests.lightning_modules.run_fakes import write_rows

INT, USR1, TERM = signal.SIGINT, signal.SIGUSR1, signal.SIGTERM


class Send(Callback):
    """Sends signals to its own process.

    Args:
        signums: Which, one after the other.
        at: The hook to do it in.
        step: After so many steps, once.
        rank: The process that gets them.
        to_all: Its process group gets them, as from a terminal or a scheduler.
    """

    def __init__(self, *signums: int, at: str = "backward", step: int = 1, rank: int = 0, to_all: bool = False) -> None:
        self.signums, self.at, self.step, self.rank, self.to_all = signums, at, step, rank, to_all

    def _send(self, trainer: Any, at: str) -> None:
        if (at, trainer.global_step, trainer.global_rank) == (self.at, self.step, self.rank) and not trainer.sanity_checking:
            signums, self.signums = self.signums, ()
            for signum in signums:
                if self.to_all:
                    in_child(partial(_send_from_outside, os.getpgid(0), signum))
                    time.sleep(0.1)  # a worker that obeys has ended by then
                else:
                    os.kill(os.getpid(), signum)

    def on_before_backward(self, trainer: Any, *args: Any) -> None:
        self._send(trainer, "backward")

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        self._send(trainer, "update")

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        self._send(trainer, "validation")


class Curve(Callback):
    """Writes the points of the curve of val/loss, and the best checkpoint that there is then."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            point = trainer.current_epoch, trainer.global_step, float(trainer.callback_metrics["val/loss"])
            with self.path.open("a") as file:
                file.write(f"{point}\n")


def _send_from_outside(group: int, signum: int) -> None:
    os.setpgid(0, 0)
    os.killpg(group, signum)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 9)


Run = Callable[..., Any]


@pytest.fixture
def run(tiny_llm: Path, tiny_clip: Path, rows: Path, tmp_path: Path) -> Run:
    """`run(name, *callbacks, **options)`: fits; the run folder has that name."""
    return lambda name, *callbacks, **options: fit(make_module(tiny_llm, tiny_clip), tmp_path / name, rows, *callbacks, **options)


def step_of(folder: Path) -> int:
    manifest = read_manifest(folder / "checkpoints/last.ckpt")
    assert manifest is not None
    return manifest.step


@pytest.mark.parametrize(
    ("signum", "at", "code", "saved"),
    [
        (TERM, "backward", 143, 2),
        (INT, "backward", 130, 2),
        (TERM, "update", 143, 2),
        (TERM, "backward", 143, 3),
        (TERM, "validation", 143, 3),
    ],
)
def test_it_stops_within_a_step_and_goes_on(
    run: Run, rows: Path, tmp_path: Path, signum: int, at: str, code: int, saved: int
) -> None:
    """Also before a validation, or in it, which is made up."""
    send = Send(signum, at=at, step=saved - (at != "validation"))
    whole, best = check_goes_on(run, rows, tmp_path, send, code, saved)  # 3 steps an epoch, then 5 batches
    assert [step for _, step, _ in whole] == [3, 6] and best == "epoch=1-step=6.ckpt"


@pytest.mark.parametrize(
    ("interval", "at", "step", "saved"),
    [(4, "backward", 1, 2), (4, "validation", 2, 2), (4, "validation", 4, 4), (3, "validation", 1, 1), (3, "validation", 5, 5)],
)
def test_validations_in_the_middle_of_an_epoch_or_of_a_step_are_made_up(
    run: Run, rows: Path, tmp_path: Path, interval: int, at: str, step: int, saved: int
) -> None:
    """Batches 4, 8 and 12 of 15 are before one, or 3, 6, 9, 12 and 15; of an epoch's steps the last has one batch."""
    options = {"val_check_interval": interval, "check_val_every_n_epoch": None, "max_epochs": 3}
    whole, _ = check_goes_on(run, rows, tmp_path, Send(TERM, at=at, step=step), 143, saved, **options)
    assert [step for _, step, _ in whole] == {4: [2, 4, 7], 3: [1, 3, 5, 7, 9]}[interval]


def check_goes_on(
    run: Run, rows: Path, folder: Path, send: Send, code: int, saved: int, **options: Any
) -> tuple[list[tuple[int, int, float]], str]:
    """Checks that a run which a signal stops ends as one that was left alone, with the same curve; which, and its best
    checkpoint, are returned."""

    def fitted(name: str, *callbacks: Callback, resume: Path | None = None) -> str:
        checkpoint = RunCheckpoint(monitor="val/loss")
        more = {"checkpoint": checkpoint, "data": {"val_path": str(rows)}, "resume": resume, **options}
        run(name, Curve(folder / f"{name}.txt"), *callbacks, **more)
        return Path(checkpoint.best_model_path).name

    def curve(name: str) -> list[tuple[int, int, float]]:
        return list(map(literal_eval, (folder / f"{name}.txt").read_text().splitlines()))

    best = fitted("whole")
    assert in_child(partial(fitted, "stopped", send)) == code
    assert step_of(folder / "stopped") == saved
    assert fitted("stopped", resume=folder / "stopped/checkpoints/last.ckpt") == best
    assert same(end_state(folder / "stopped"), end_state(folder / "whole"))
    assert curve("stopped") == curve("whole")
    return curve("whole"), best


def test_a_second_interrupt_ends_it_at_once(run: Run, tmp_path: Path) -> None:
    assert in_child(partial(run, "stopped", Send(INT, INT))) == 130
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(("signums", "code"), [((TERM,), 143), ((INT, INT), 130), ((USR1,), 0)])
def test_workers_leave_to_the_run_what_all_its_processes_are_sent(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], signums: tuple[int, ...], code: int
) -> None:
    def act() -> None:
        os.setpgid(0, 0)  # a group without the tests
        run("run", Send(*signums, to_all=True), data={"num_workers": 2})

    assert in_child(act) == code
    assert "Traceback" not in capfd.readouterr().err
    if INT not in signums:
        assert step_of(tmp_path / "run") == {TERM: 2, USR1: 6}[signums[0]]


def test_what_asks_for_a_checkpoint_gets_one_and_the_run_goes_on(run: Run, tmp_path: Path) -> None:
    steps: list[int] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2 and not steps:
                steps.append(step_of(tmp_path / "run"))

    before = [signal.getsignal(signum) for signum in (INT, USR1, TERM)]
    run("run", Send(USR1), Look())
    assert steps == [2] and step_of(tmp_path / "run") == 6
    assert [signal.getsignal(signum) for signum in (INT, USR1, TERM)] == before


@pytest.fixture
def requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the command of a SLURM job, which this process is now, was asked for."""
    scontrol, asked = tmp_path / "bin/scontrol", tmp_path / "requeued"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    of_job = {"JOB_ID": 77, "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "train"}
    for name, value in of_job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return asked


def test_a_slurm_job_is_put_back_into_the_queue(run: Run, requeued: Path, tmp_path: Path) -> None:
    run("whole")
    assert in_child(partial(run, "job", Send(USR1, at="update"), plugins=[SLURMEnvironment()])) == 128 + USR1
    assert requeued.read_text() == "requeue 77\n"
    assert step_of(tmp_path / "job") == 2 and not list(tmp_path.rglob("hpc_ckpt*"))
    run("job", resume=tmp_path / "job/checkpoints/last.ckpt")
    assert same(end_state(tmp_path / "job"), end_state(tmp_path / "whole"))


def test_so_is_one_of_an_array_whose_checkpoint_cannot_be_written(
    run: Run, requeued: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run is to go on without: it does, from the checkpoint before."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    files, every_step = FullAt(), RunCheckpoint(every_n_train_steps=1, on_save_error="go_on")
    options = {"checkpoint": every_step, "files": files, "plugins": [SLURMEnvironment()]}
    assert in_child(partial(run, "job", Send(USR1, at="update"), **options)) == 128 + USR1
    assert requeued.read_text() == "requeue 70_3\n" and step_of(tmp_path / "job") == 1


def test_a_signal_to_one_process_stops_all(run: Run, tmp_path: Path) -> None:
    def job(name: str, strategy: dict[str, Any], *callbacks: Callback, **options: Any) -> None:
        trainer = run(name, *callbacks, data={"batch_size": 1}, checkpoint=RunCheckpoint(every_n_epochs=9), **strategy, **options)
        torch.save(trainer.global_step, tmp_path / f"{trainer.global_rank}.pt")

    assert in_two_processes(lambda strategy: job("stopped", strategy, Send(TERM, rank=1))) == [143, 143]
    assert step_of(tmp_path / "stopped") == 2
    resume = tmp_path / "stopped/checkpoints/last.ckpt"
    assert in_two_processes(lambda strategy: job("stopped", strategy, resume=resume)) == [0, 0]
    assert in_two_processes(lambda strategy: job("whole", strategy)) == [0, 0]
    assert same(end_state(tmp_path / "stopped"), end_state(tmp_path / "whole"))
