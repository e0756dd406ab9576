"""A run goes on at its place, also in other batches or other processes."""

from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins import Precision

from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.run_state import take_place
from models.manifest import read_manifest, temporary_name
from models.spread import whole
from tests.faults.small_runs import fit, make_module
from tests.lightning_modules.processes import in_two_processes, sharded
from tests.lightning_modules.run_fakes import Watch, write_rows

Lines = dict[tuple[int, int], list[int]]


class Taken(Callback):
    """The lines of the file that each optimizer step took, by epoch and step."""

    def __init__(self) -> None:
        self.lines: Lines = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        lines = self.lines.setdefault((trainer.current_epoch, trainer.global_step), [])
        lines += [example["line"] for example in batch["examples"]]


@pytest.mark.parametrize(("num_rows", "checkpoint"), [(9, {}), (13, {"every_n_train_steps": 1})], ids=str)
@pytest.mark.parametrize(("first", "then"), [((2, 2), (4, 1)), ((4, 1), (2, 2)), ((1, 4), (2, 2))], ids=str)
def test_behind_an_epoch_it_goes_on_in_other_batches(
    tiny_llm: Path, tiny_clip: Path, tmp_path: Path, num_rows: int, checkpoint: Any, first: tuple[int, int], then: tuple[int, int]
) -> None:
    """Rows of a batch, and batches of a step. The last step of an epoch has one row, and so fewer batches."""
    rows = write_rows(tmp_path / "rows.jsonl", num_rows)

    def run(name: str, batches: tuple[int, int], max_epochs: int, resume: Path | None = None) -> Lines:
        taken, (batch_size, accumulate) = Taken(), batches
        options = {"max_epochs": max_epochs, "accumulate_grad_batches": accumulate, "data": {"batch_size": batch_size}}
        module, often = make_module(tiny_llm, tiny_clip), RunCheckpoint(**checkpoint)
        fit(module, tmp_path / name, rows, taken, checkpoint=often, resume=resume, **options)
        return {step: sorted(lines) for step, lines in taken.lines.items()}

    whole, before = run("whole", then, 3), run("run", first, 1)
    after = run("run", then, 3, tmp_path / "run/checkpoints/last.ckpt")
    assert before | after == whole and not before.keys() & after.keys()
    for epoch in range(3):
        assert Counter(sum((lines for (of, _), lines in whole.items() if of == epoch), [])) == Counter(range(1, num_rows + 1))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [{}, {"every_n_epochs": 9}, {"every_n_train_steps": 50}], ids=str)
@pytest.mark.parametrize("end", ["max_steps", "should_stop"])
def test_a_run_that_ended_inside_of_an_epoch_goes_on_there(
    tiny_llm: Path, tiny_clip: Path, tmp_path: Path, checkpoint: Any, end: str
) -> None:
    """It is made longer; however seldom it saves."""
    rows = write_rows(tmp_path / "rows.jsonl", 13)

    def run(name: str, num_steps: int, resume: Path | None = None) -> Lines:
        taken = Taken()
        stop = Watch(lambda trainer, module: setattr(trainer, "should_stop", trainer.global_step == num_steps))
        options: dict[str, Any] = {"max_epochs": 3} | ({"max_steps": num_steps} if end == "max_steps" else {})
        callbacks = [taken] if end == "max_steps" else [taken, stop]
        module, often = make_module(tiny_llm, tiny_clip), RunCheckpoint(**checkpoint)
        fit(module, tmp_path / name, rows, *callbacks, checkpoint=often, resume=resume, **options)
        return taken.lines

    whole, before = run("whole", 9), run("run", 2)
    after = run("run", 9, tmp_path / "run/checkpoints/last.ckpt")
    assert before | after == whole and not before.keys() & after.keys() and len(before) == 2 and len(whole) == 9


def test_processes_that_split_layers_go_on_with_one_generator(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """Two that had rows of their own, of different lengths, have drawn different numbers for dropout."""
    rows = write_rows(tmp_path / "rows.jsonl", 9)

    def run(name: str, trainer_options: Any, batch_size: int, resume: Path | None = None, **options: Any) -> None:
        module = make_module(tiny_llm, tiny_clip)
        trainer = fit(module, tmp_path / name, rows, resume=resume, data={"batch_size": batch_size}, **trainer_options, **options)
        weights = {name: whole(tensor).detach().clone() for name, tensor in module.model.state_dict().items()}
        torch.save([weights, torch.get_rng_state()], tmp_path / f"{name}-{trainer.global_rank}.pt")

    resume = tmp_path / "first/checkpoints/last.ckpt"
    assert in_two_processes(run, "first", strategy=sharded, batch_size=1, max_steps=2) == [0, 0]
    assert in_two_processes(run, "then", strategy=partial(sharded, tensor_parallel_size=2), batch_size=2, resume=resume) == [0, 0]
    for name, is_one in (("first", False), ("then", True)):
        (weights, state), (others, other) = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
        assert torch.equal(state, other) == is_one
        assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("saved", "processes", "together", "expected"),
    [
        (2, 2, 1, [0, 1]),
        (2, 2, 2, [0, 0]),
        (2, 4, 2, [0, 0, 1, 1]),
        (1, 2, 2, [0, 0]),
        (1, 2, 1, [0, 0]),
        (4, 4, 2, [0, 0, 1, 1]),
    ],
)
def test_groups_of_processes_take_the_generators_of_groups(
    saved: int, processes: int, together: int, expected: list[int], recwarn: pytest.WarningsRecorder
) -> None:
    """What the checkpoint has of each group, and how many processes go on, so many of which split layers between them."""
    replicas = {"num_replicas": processes // together}
    for rank, state in enumerate(expected):
        progress = {"fit_loop": {"epoch_loop.batch_progress": {"current": {"processed": 0}}}}
        checkpoint = {"loops": progress, "accumulate_grad_batches": 1, "rng": list(range(saved))}
        place = {"world_size": processes, "global_rank": rank, "distributed_sampler_kwargs": replicas}
        trainer: Any = SimpleNamespace(**place, accumulate_grad_batches=1, precision_plugin=Precision())
        assert take_place(checkpoint, trainer) == state
    assert any(f"is of {saved} process(es)" in str(warning.message) for warning in recwarn.list) == (
        saved != processes // together
    )


def test_a_checkpoint_and_its_manifest_say_which_wandb_run_they_are_of(
    tiny_llm: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, path = write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "run/checkpoints/last.ckpt"
    monkeypatch.setattr(WandbLogger, "after_save_checkpoint", lambda *arguments: None)
    logger = WandbLogger(save_dir=tmp_path, id="run-7", offline=True)
    monkeypatch.setattr(logger, "_experiment", MagicMock(id="run-7"))  # as if the run had begun
    fit(make_module(tiny_llm, tiny_clip), tmp_path / "run", rows, logger=logger, max_steps=1)
    manifest = read_manifest(path)
    assert manifest is not None and manifest.wandb_run_id == "run-7"
    assert torch.load(path, weights_only=True)["wandb_run_id"] == "run-7"


def test_what_a_kill_left_of_steps_that_were_kept_is_swept(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    kept = temporary_name(tmp_path / "run/non_finite/step=3.ckpt")
    kept.parent.mkdir(parents=True)
    kept.write_text("half")
    fit(make_module(tiny_llm, tiny_clip), tmp_path / "run", write_rows(tmp_path / "rows.jsonl", 3), max_steps=1)
    assert not list(kept.parent.iterdir())
