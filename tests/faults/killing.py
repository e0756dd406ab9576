"""Kills real runs at random moments, lets them go on, and compares them with one that was left alone.

A run is `train.main` in a forked process, which finds its libraries imported, so that it costs its own seconds alone. A moment is
drawn over the CPU time of a run, or over what it does while it saves: writes to the disk, before each and in the middle of it,
and the opening, renaming and removing of files.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import Callback

from lightning_modules.checkpoints import CheckpointFile
from tests.forked import fork
from train import main

ROOT = Path(__file__).parents[2]
STEPS = 6
"""Optimizer steps of a run: more than an epoch."""

OPTIONS = [
    *("fit", f"--config={ROOT}/configs/sft/tiny_all.yaml"),
    *("--trainer.accumulate_grad_batches=2", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"),
    *(f"--trainer.max_steps={STEPS}", "--trainer.max_epochs=-1", "--trainer.callbacks+=tests.faults.killing.RowLog"),
    *(
        "--trainer.plugins=tests.faults.killing.KilledWhileSaving",
        "--checkpoint.every_n_train_steps=1",
        "--checkpoint.monitor=null",
    ),
    *("--data.batching.kind=packed", "--data.batching.max_tokens=128", "--data.batch_size=1"),
    *("--data.sources.shapes.augment.image=ImageAugment", "--data.sources.shapes.weight=0.25"),
    *("--data.sources.clips.weight=0.5", "--data.sources.tones.weight=0.5"),
    "--model.language_model.tune={mode: lora, lora: {dropout: 0.3, target_modules: [q_proj, v_proj]}}",
]
"""Pictures, clips, sounds and text in one mixture, packed, in accumulated steps, with dropout and augmentation."""


class RowLog(Callback):
    """Writes down which rows a batch has, before it is trained on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rows = " ".join(f"{row['source']}:{row['line']}" for row in batch["examples"])
        with (Path(trainer.default_root_dir).parent / "rows.log").open("a") as file:
            file.write(f"{trainer.current_epoch}/{batch_idx} {rows}\n")


class KilledWhileSaving(CheckpointFile):
    """Writes checkpoints, and ends the process at a moment of it.

    `passed` counts the moments of all saves by their kind: `write`, before and in the middle of one, and `name`, before a file is
    opened, renamed or removed. `last` is the kind and number of the one that is not outlived.
    """

    passed: ClassVar[Counter[str]] = Counter()
    last: tuple[str, int] | None = None
    _saves = False

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._watched():
            super().save_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._watched():
            super().remove_checkpoint(*args, **kwargs)

    def open(self, path: Path) -> io.RawIOBase:
        return _Watched(path, "wb")

    @classmethod
    def pass_moment(cls, kind: str) -> None:
        if cls._saves:
            if (kind, cls.passed[kind]) == cls.last:
                os.kill(os.getpid(), signal.SIGKILL)
            cls.passed[kind] += 1

    @classmethod
    def audit(cls, event: str, _: object) -> None:
        if event in ("open", "os.rename", "os.remove"):
            cls.pass_moment("name")

    @classmethod
    @contextlib.contextmanager
    def _watched(cls) -> Iterator[None]:
        cls._saves = True
        yield
        cls._saves = False


class _Watched(io.FileIO):
    def write(self, data: Any) -> int:
        KilledWhileSaving.pass_moment("write")
        half = len(data) // 2
        written = super().write(data[:half]) if half else 0
        KilledWhileSaving.pass_moment("write")
        return written + super().write(data[half:])


class Ended(NamedTuple):
    """How a run ended: its exit code (negative: the signal), its CPU seconds, and the moments of its saves by kind."""

    code: int
    cpu_seconds: float
    moments: dict[str, int]


class Result(NamedTuple):
    """What a run left behind: SHA-256 of its state (weights, optimizer, scheduler, generators, place) and of the rows of each
    batch, and all files in its folder and in that for temporary files."""

    state: str
    order: str
    files: frozenset[str]


@dataclass(frozen=True)
class Killed:
    """What became of a run that was killed and went on.

    Args:
        number: Of the kill.
        inside_save: It was killed while it saved.
        is_identical: It ended as the one that was left alone.
        orphans: Files that the other has not.
        problem: Why it did not go on to its end; empty: it did.
    """

    number: int
    inside_save: bool
    is_identical: bool
    orphans: list[str]
    problem: str = ""


def start(folder: Path, kill_after: float | None = None, moment: tuple[str, int] | None = None) -> Ended:
    """Starts a run in a folder, or lets the one that is there go on; and may kill it.

    Args:
        folder: Of the run, its temporary files and its messages.
        kill_after: CPU seconds after which it is killed.
        moment: Kind and number of the moment of its saves that it does not outlive.
    """
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    child = fork(partial(_run, folder, moment))
    if kill_after is not None:
        while _cpu_seconds(child) < kill_after and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    moments = json.loads((folder / "moments.json").read_text()) if os.waitstatus_to_exitcode(status) == 0 else {}
    return Ended(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, moments)


def _run(folder: Path, moment: tuple[str, int] | None) -> None:
    """The life of a forked process."""
    with (folder / "log.txt").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(TMPDIR=str(folder / "tmp"), XDG_CACHE_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1")
    os.environ.pop("PL_GLOBAL_SEED", None)
    os.chdir(ROOT)
    words = folder.parent / "words.jsonl"
    KilledWhileSaving.last = moment
    sys.addaudithook(KilledWhileSaving.audit)
    resume = ["--ckpt_path=last"] if (folder / "run/config.yaml").exists() else []
    main([*OPTIONS, f"--data.sources.words.train_path={words}", f"--trainer.default_root_dir={folder / 'run'}", *resume])
    (folder / "moments.json").write_text(json.dumps(KilledWhileSaving.passed))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def result(folder: Path) -> Result:
    """What a run has left behind."""
    checkpoint = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "MixtureDataModule", "global_step")
    rows: dict[str, str] = {}
    for line in (folder / "rows.log").read_text().splitlines():
        batch, _, ids = line.partition(" ")
        if rows.setdefault(batch, ids) != ids:
            rows[f"{batch} again"] = ids
    files = (
        path.relative_to(folder).as_posix()
        for name in ("run", "tmp", "cache")
        for path in (folder / name).rglob("*")
        if not path.is_dir()
    )
    return Result(
        digest({name: checkpoint[name] for name in names}),
        digest(rows),
        frozenset(re.sub(r"version_\d+", "version", name) for name in files),
    )


def digest(state: Any) -> str:
    """SHA-256 of nested lists and dictionaries of tensors and plain values."""
    total = hashlib.sha256()
    for part in _parts(state):
        total.update(part)
    return total.hexdigest()


def _parts(state: Any) -> Iterator[bytes]:
    if isinstance(state, torch.Tensor):
        yield f"{state.dtype} {tuple(state.shape)}".encode()
        yield state.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(state, (dict, list, tuple)):
        items = sorted(state.items(), key=lambda item: str(item[0])) if isinstance(state, dict) else list(enumerate(state))
        yield f"[{len(items)}".encode()
        for key, value in items:
            yield f"{key!r}:".encode()
            yield from _parts(value)
    else:
        yield f"{state!r};".encode()


def kill_runs(folder: Path, numbers: Iterable[int], seed: int = 0) -> Iterator[Killed]:
    """Kills runs, every third of them while it saves, and lets each go on to its end.

    Args:
        folder: For the runs; those that ended as they should are removed.
        numbers: Of the kills; each has its own moment, whichever others are asked for.
        seed: Draws the moments.
    """
    turns = [[("user", f"Say {word}."), ("assistant", word)] for word in ("red", "green", "up", "down", "rises", "falls")]
    rows = ({"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns)
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = start(folder / "alone")
    assert alone.code == 0, (folder / "alone/log.txt").read_text()[-2000:]
    expected = result(folder / "alone")
    for number in numbers:
        generator = random.Random(f"{seed}/{number}")
        own, inside_save = folder / f"killed-{number}", number % 3 == 0
        ended = Ended(0, 0.0, {})
        while ended.code == 0:  # it was over before its moment had come
            shutil.rmtree(own, ignore_errors=True)
            if inside_save:
                kind = generator.choice(("write", "name"))
                ended = start(own, moment=(kind, generator.randrange(alone.moments[kind])))
            else:
                ended = start(own, kill_after=generator.uniform(0, alone.cpu_seconds))
        assert ended.code == -signal.SIGKILL, (own / "log.txt").read_text()[-2000:]
        if start(own).code:
            yield Killed(number, inside_save, False, [], (own / "log.txt").read_text()[-2000:])
            continue
        got = result(own)
        is_identical, orphans = got[:2] == expected[:2], sorted(got.files - expected.files)
        if is_identical and not orphans:
            shutil.rmtree(own)
        yield Killed(number, inside_save, is_identical, orphans)


def import_all() -> None:
    """Imports what a run imports, so that forked ones find it there."""
    import peft  # noqa: F401
    import timm  # noqa: F401
    import transformers.models.llama.modeling_llama
    import transformers.models.whisper.modeling_whisper  # noqa: F401
