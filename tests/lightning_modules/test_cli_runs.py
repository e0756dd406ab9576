"""Runs of the command line that cannot begin, or are stopped: what they say, and what they leave."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback

from lightning_modules.cli import quiet_lightning, show_user_errors
from lightning_modules.run_lock import LOCK
from models.manifest import read_manifest
from tests.forked import in_child
from tests.lightning_modules.run_fakes import write_rows
from train import main

TINY = ["--config", "configs/sft/tiny.yaml", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]


class Ended(NamedTuple):
    code: int
    error: str


def run(folder: Path, *arguments: str, command: str = "fit") -> Ended:
    """Runs the command line in a forked process, as `python train.py` does; saves the seconds of a new interpreter."""
    log = folder.parent / f"{folder.name}.stderr"

    def act() -> None:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.excepthook = show_user_errors(sys.__excepthook__)
        quiet_lightning()
        with contextlib.redirect_stdout(sys.stderr):
            main([command, *TINY, "--trainer.default_root_dir", str(folder), *arguments])

    return Ended(in_child(act), log.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in this process, so that those in forked ones find their libraries imported."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    import peft  # noqa: F401  # the recipe itself needs none

    main(["fit", *TINY, "--trainer.default_root_dir", str(folder), "--trainer.max_steps=2", "--trainer.limit_val_batches=0"])
    return folder


@pytest.fixture
def own_rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 16)


def huge_png(side: int) -> bytes:
    """A PNG that says it has so many pixels, and has none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    end = b"IEND"
    chunks = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, end)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def expect(ended: Ended, *patterns: str) -> None:
    assert ended.code == 1
    assert "Traceback" not in ended.error
    paragraph = ended.error.split("\nerror: ")[1].strip()
    assert "\n" not in paragraph
    for pattern in patterns:
        assert re.search(pattern, paragraph), paragraph


@pytest.mark.usefixtures("finished")
class TestWhatAUserCanCause:
    @pytest.mark.parametrize(
        ("argument", "patterns"),
        [
            ("--data.train_path=nowhere.jsonl", ["data.train_path", r"nowhere\.jsonl"]),
            ("--data.media_root=nowhere", ["media_root .*nowhere does not exist"]),
            ("--model.language_model.name_or_path=./nowhere", ["nowhere", "expected a folder"]),
            ("--ckpt_path=nowhere.ckpt", [r"there is no nowhere\.ckpt"]),
            ("--model.language_model.tune={mode: lora, lora: {target_modules: [qq]}}", ["'qq'", "q_proj"]),
            ("--model.image_projector=PixelShuffleMLPProjector", ["square grid", "factor"]),
            ("--model.warmup_ratio=7", ["warmup_ratio"]),
        ],
    )
    def test_a_wrong_option(self, argument: str, patterns: list[str], tmp_path: Path) -> None:
        tune = ["--model.image_encoder.image_size=48"] if "PixelShuffle" in argument else []  # a grid of 3 by 3
        expect(run(tmp_path / "run", argument, *tune), *patterns)
        assert not list(tmp_path.rglob("*.ckpt"))

    def test_a_second_run_into_a_folder(self, finished: Path) -> None:
        expect(run(finished), "already holds a run", "--ckpt_path last")

    def test_a_checkpoint_that_is_damaged(self, finished: Path, tmp_path: Path) -> None:
        whole = (finished / "checkpoints/last.ckpt").read_bytes()
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes(whole[: len(whole) // 2])
        expect(run(tmp_path / "resumed", f"--ckpt_path={cut}"), r"cut\.ckpt cannot be read", "cut off")
        expect(run(tmp_path / "warm", f"--model.init_from={cut}"), r"cut\.ckpt cannot be read", "cut off")

    def test_a_file_that_is_no_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "text.ckpt").write_text("hello")
        expect(
            run(tmp_path / "run", f"--ckpt_path={tmp_path / 'text.ckpt'}", command="validate"),
            r"text\.ckpt cannot be read as a checkpoint",
        )
        torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
        expect(run(tmp_path / "run", f"--ckpt_path={tmp_path / 'foreign.ckpt'}"), "no checkpoint of this project")

    def test_a_checkpoint_of_another_width(self, finished: Path, tmp_path: Path) -> None:
        wider = "--model.image_projector.hidden_size=48"
        expect(
            run(tmp_path / "resumed", f"--ckpt_path={finished / 'checkpoints/last.ckpt'}", wider),
            r"image_projector\.hidden_size",
            "48",
        )
        expect(run(tmp_path / "warm", f"--model.init_from={finished / 'checkpoints/last.ckpt'}", wider), "no place for")

    def test_pictures_that_cannot_be_used(self, own_rows: Path, tmp_path: Path) -> None:
        (tmp_path / "rows-0.png").write_bytes(b"")
        (tmp_path / "rows-1.png").write_text("not a picture")
        (tmp_path / "rows-2.png").unlink()
        (tmp_path / "rows-3.png").write_bytes((tmp_path / "rows-5.png").read_bytes()[:60])
        (tmp_path / "rows-6.png").write_bytes(huge_png(65_000))
        data = [f"--data.train_path={own_rows}", f"--data.val_path={own_rows}", "--data.eval_batch_size=16"]
        expect(
            run(tmp_path / "stopped", *data, "--trainer.max_epochs=1", "--data.num_workers=1"),
            r"rows\.jsonl could not be used",
            r"data\.max_skipped = 0\.01",
            r"skipped\.jsonl",
        )
        ended = run(tmp_path / "run", *data, "--trainer.max_epochs=1", "--data.max_skipped=0.5")
        assert ended.code == 0
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert (summary["rows"], summary["trained"], summary["skipped"]) == (16, 11, 5)
        named = {json.loads(line)["line"] for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()}
        assert named == {1, 2, 3, 4, 7}

    def test_what_a_worker_cannot_do_is_said_as_if_it_were_here(self, own_rows: Path, tmp_path: Path) -> None:
        """The first row is one without a picture, so only a worker finds that no picture of the others can be encoded."""
        lines = own_rows.read_text().splitlines()
        own_rows.write_text("\n".join([lines[4], *lines[:4]]) + "\n")
        projector = ["--model.image_projector=PixelShuffleMLPProjector", "--model.image_encoder.image_size=48"]
        data = [f"--data.train_path={own_rows}", f"--data.val_path={own_rows}", "--data.num_workers=1"]
        expect(run(tmp_path / "run", *data, *projector), "^PixelShuffleMLPProjector takes a square grid")

    @pytest.mark.slow
    def test_the_program_itself_says_it_too(self, tmp_path: Path) -> None:
        command = [sys.executable, "train.py", "fit", *TINY, "--trainer.default_root_dir", str(tmp_path / "run")]
        done = subprocess.run([*command, "--data.train_path=nowhere.jsonl"], capture_output=True, text=True, check=False)
        expect(Ended(done.returncode, done.stderr), r"nowhere\.jsonl")


class Interrupt(Callback):
    """Presses Ctrl-C.

    Args:
        step: After so many steps.
        in_backward: In the middle of the next batch instead of at the end of one.
    """

    def __init__(self, step: int, in_backward: bool = False) -> None:
        self.step = step
        self.in_backward = in_backward

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and not self.in_backward:
            os.kill(os.getpid(), signal.SIGINT)

    def on_before_backward(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step and self.in_backward:
            os.kill(os.getpid(), signal.SIGINT)


MORE_STEPS = [
    "--trainer.max_steps=6",
    "--trainer.limit_val_batches=0",
    "--data.augment=ImageAugment",
    "--model.language_model.tune={mode: lora, lora: {dropout: 0.3, target_modules: [q_proj, v_proj]}}",
    "--checkpoint.every_n_epochs=9",
]


@pytest.fixture(scope="module")
def uninterrupted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder, *MORE_STEPS).code == 0
    return folder


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_interrupted_run_ends_quietly_and_goes_on(uninterrupted: Path, in_backward: bool, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    interrupt = ["--trainer.callbacks+", f"{__name__}.Interrupt", "--trainer.callbacks.step=3"]
    ended = run(folder, *MORE_STEPS, *interrupt, f"--trainer.callbacks.in_backward={str(in_backward).lower()}")
    assert ended.code == 130
    assert "Traceback" not in ended.error
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3 + in_backward
    assert run(folder, *MORE_STEPS, "--ckpt_path=last").code == 0
    ends = [torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (uninterrupted, folder)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 6
    assert all(torch.equal(tensor, ends[1]["state_dict"][name]) for name, tensor in ends[0]["state_dict"].items())


class Kill(Callback):
    """Ends the process without a word, in the middle of a step.

    Args:
        step: After so many steps.
        worker: One that reads data instead of that which trains.
    """

    def __init__(self, step: int, worker: bool = False) -> None:
        self.step = step
        self.worker = worker

    def on_before_backward(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            children = multiprocessing.active_children()
            os.kill(min(child.pid for child in children if child.pid) if self.worker else os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_from_its_last_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    folder, often = tmp_path / "killed", "--checkpoint.every_n_train_steps=2"
    steps = [option for option in MORE_STEPS if not option.startswith("--checkpoint")]
    steps.append("--data.num_workers=2")  # they outlive the run, and keep nobody out of its folder
    ended = run(folder, *steps, often, "--trainer.callbacks+", f"{__name__}.Kill", "--trainer.callbacks.step=5")
    assert ended.code == -signal.SIGKILL
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert run(folder, *steps, often, "--ckpt_path=last").code == 0
    ends = [torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (uninterrupted, folder)]
    assert all(torch.equal(tensor, ends[1]["state_dict"][name]) for name, tensor in ends[0]["state_dict"].items())
    assert [path.name for path in folder.rglob(".*")] == [LOCK]


def test_a_worker_that_is_killed_ends_the_run_which_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    kill = ["--trainer.callbacks+", f"{__name__}.Kill", "--trainer.callbacks.step=3", "--trainer.callbacks.worker=true"]
    ended = run(folder, *MORE_STEPS, "--data.num_workers=2", *kill)
    expect(ended, r"reads data (is killed by signal: Killed|exited unexpectedly): .*memory.*--ckpt_path last goes on")
    manifest = read_manifest(folder / "checkpoints/last.ckpt")
    assert manifest is not None and manifest.step in (3, 4)
    assert run(folder, *MORE_STEPS, "--data.num_workers=2", "--ckpt_path=last").code == 0
    ends = [torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (uninterrupted, folder)]
    assert all(torch.equal(tensor, ends[1]["state_dict"][name]) for name, tensor in ends[0]["state_dict"].items())
