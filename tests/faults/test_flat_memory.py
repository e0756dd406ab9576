"""A long run takes no more memory than a short one."""

import gc
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback

from tests.faults.small_runs import fit, make_module
from tests.lightning_modules.run_fakes import write_rows

STEPS = 3000
MIB = 2**20


class Memory(Callback):
    """Notes what the process holds in memory after every 500 steps, garbage collected."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        if args[0].global_step % 500 == 0:
            gc.collect()
            self.held.append(psutil.Process().memory_info().rss)


@pytest.mark.slow
def test_memory_does_not_grow_over_thousands_of_steps(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    memory = Memory()
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    module, steps = make_module(tiny_llm, tiny_clip), {"max_steps": STEPS, "max_epochs": -1, "accumulate_grad_batches": 1}
    fit(module, tmp_path / "run", rows, memory, **steps)
    assert len(memory.held) == STEPS // 500
    # a graph kept of each step, or its batch of pictures, would be 10 KiB a step or more: 25 MiB
    assert memory.held[-1] - memory.held[0] < 8 * MIB, [held // MIB for held in memory.held]
