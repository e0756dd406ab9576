"""The loss of an optimizer step is a mean over all its tokens (or pairs), whatever batches and processes they came in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_modules.dpo import DPOLitModule
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.simpo import SimPOLitModule
from tests.lightning_modules.preference_fakes import make_module, sgd, write_pairs
from tests.lightning_modules.processes import in_two_processes
from tests.lightning_modules.run_fakes import Watch, make_data, make_trainer, weights

ROWS = 16
BATCHES = ((8, 1), (4, 2), (1, 8))
"""Rows of a batch, and batches of an optimizer step."""
Job = Callable[[Path, dict[str, Any], int, int], None]


@pytest.fixture
def job(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> Callable[[type[MultiModalLitModule]], Job]:
    """`job(kind)(folder, trainer_options, batch_size, accumulate)`: two steps of eight rows; keeps losses and weights.

    Rows have answers of different lengths, and some have no picture.
    """
    rows = write_pairs(tmp_path / "rows.jsonl", ROWS)

    def make(kind: type[MultiModalLitModule]) -> Job:
        def run(folder: Path, trainer_options: dict[str, Any], batch_size: int, accumulate: int) -> None:
            torch.manual_seed(4)
            module: Any = make_module(kind, tiny_llm, tiny_clip, optimizer=sgd())  # type: ignore[type-var]
            losses: list[Tensor] = []

            def look(trainer: Any, module: LightningModule) -> None:
                if trainer.global_step > len(losses):
                    losses.append(trainer.callback_metrics["train/loss"].clone())

            trainer = make_trainer(
                folder, Watch(look), accumulate_grad_batches=accumulate, gradient_clip_val=0.5, **trainer_options
            )
            trainer.fit(module, make_data(module, rows, batch_size=batch_size, shuffle=False))
            assert trainer.global_step == 2
            folder.mkdir(exist_ok=True)
            torch.save([weights(module), losses], folder / f"{trainer.global_rank}.pt")

        return run

    return make


def same(folder: Path, other: Path, rank: int = 0) -> None:
    (expected, losses), (got, own) = (torch.load(path, weights_only=True) for path in (folder / "0.pt", other / f"{rank}.pt"))
    assert torch.allclose(torch.stack(losses), torch.stack(own), atol=0, rtol=1e-6) and losses[0] != losses[1]
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-6, rtol=0), name


def test_batches_and_processes_do_not_matter(job: Callable[..., Job], tmp_path: Path) -> None:
    run = job(MultiModalLitModule)
    for batch_size, accumulate in BATCHES:
        run(tmp_path / f"{batch_size}", {}, batch_size, accumulate)
        same(tmp_path / "8", tmp_path / f"{batch_size}")
    assert in_two_processes(run, tmp_path / "two", batch_size=2, accumulate=2) == [0, 0]
    for rank in range(2):
        same(tmp_path / "8", tmp_path / "two", rank)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MultiModalLitModule, DPOLitModule, SimPOLitModule])
def test_nor_do_they_where_answers_are_compared(job: Callable[..., Job], tmp_path: Path, kind: type[MultiModalLitModule]) -> None:
    run = job(kind)
    for batch_size, accumulate in BATCHES:
        run(tmp_path / f"{batch_size}", {}, batch_size, accumulate)
        same(tmp_path / "8", tmp_path / f"{batch_size}")
    for batch_size, accumulate in ((4, 1), (1, 4)):
        folder = tmp_path / f"two-{batch_size}"
        assert in_two_processes(run, folder, batch_size=batch_size, accumulate=accumulate) == [0, 0]
        for rank in range(2):
            same(tmp_path / "8", folder, rank)
