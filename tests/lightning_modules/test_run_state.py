"""A run goes on at its place, also in other batches or other processes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_modules.checkpoints import RunCheckpoint
from tests.faults.small_runs import fit, make_module
from tests.lightning_modules.run_fakes import write_rows

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
