"""Runs that are killed end as one that was left alone; `benchmarks/resume.py` kills 50."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.cli import find_checkpoint
from tests.faults.killing import Killed, kill_runs
from tests.faults.small_runs import end_state, fit, make_module, same
from tests.lightning_modules.run_fakes import write_rows

RESUME = Path(__file__).parents[2] / "benchmarks/resume.py"


def test_runs_that_are_killed_end_as_one_that_was_left_alone(tmp_path: Path) -> None:
    expected = [Killed(number, inside_save=number % 3 == 0, is_identical=True, orphans=[]) for number in range(2)]
    assert list(kill_runs(tmp_path, range(2), seed=1)) == expected


@pytest.mark.slow
def test_more_of_them() -> None:
    """In a process of their own: one that has run a backward pass on fake tensors, as `plan` does, has autograd's threads, and a
    process that is forked from it cannot train."""
    ran = subprocess.run([sys.executable, RESUME, "--kills", "12", "--seed", "1"], stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(ran.stdout.splitlines()[-1]) == {"kills": 12, "identical_share": 1.0, "orphans": 0}, ran.stdout


def test_a_kill_behind_the_last_of_a_run_s_best_checkpoints(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """The newest of a run was written, neither was last.ckpt, nor was the one before removed."""

    def run(max_steps: int, resume: str | None = None) -> None:
        module, checkpoint = make_module(tiny_llm, tiny_clip), RunCheckpoint(every_n_train_steps=1)
        fit(module, tmp_path / "run", rows, checkpoint=checkpoint, max_steps=max_steps, max_epochs=-1, resume=resume)

    def names() -> list[str]:
        return sorted(file.name for file in (tmp_path / "run/checkpoints").iterdir())

    rows = write_rows(tmp_path / "rows.jsonl", 9)
    run(1)
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "before")
    run(2, find_checkpoint("last", tmp_path / "run"))
    whole, left = end_state(tmp_path / "run"), names()
    shutil.copytree(tmp_path / "before", tmp_path / "run/checkpoints", dirs_exist_ok=True)
    assert end_state(tmp_path / "run")["global_step"] == 1 and len(names()) == len(left) + 2
    found = find_checkpoint("last", tmp_path / "run")
    assert found is not None and Path(found).name == "epoch=0-step=2.ckpt"
    run(2, found)
    assert same(end_state(tmp_path / "run"), whole) and names() == left
