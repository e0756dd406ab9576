"""The loss of an optimizer step is a mean over all its tokens (or pairs), whatever batches and processes they came in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.cpo import CPOLitModule
from lightning_modules.dpo import DPOLitModule
from lightning_modules.mdpo import MDPOLitModule
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.orpo import ORPOLitModule
from lightning_modules.simpo import SimPOLitModule
from tests.lightning_modules.preference_fakes import constant, make_module, sgd, write_pairs
from tests.lightning_modules.processes import gathered, in_two_processes
from tests.lightning_modules.run_fakes import Watch, make_data, make_trainer, weights

ROWS = 16
BATCHES = ((8, 1), (4, 2), (1, 8))
"""Rows of a batch, and batches of an optimizer step."""
Job = Callable[[Path, dict[str, Any], int, int], None]


@pytest.fixture
def job(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> Callable[..., Job]:
    """`job(kind, **options)(folder, trainer_options, batch_size, accumulate)`: two steps of eight rows; keeps losses and weights.

    Rows have answers of different lengths, and some have no picture.
    """
    rows = write_pairs(tmp_path / "rows.jsonl", ROWS)

    def make(kind: type[MultiModalLitModule], **options: Any) -> Job:
        def run(folder: Path, trainer_options: dict[str, Any], batch_size: int, accumulate: int) -> None:
            torch.manual_seed(4)
            module: Any = make_module(kind, tiny_llm, tiny_clip, optimizer=sgd(), **options)  # type: ignore[type-var]
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
            with gathered(module):
                torch.save([weights(module), losses], folder / f"{trainer.global_rank}.pt")

        return run

    return make


def same(folder: Path, other: Path, rank: int = 0) -> None:
    (expected, losses), (got, own) = (torch.load(path, weights_only=True) for path in (folder / "0.pt", other / f"{rank}.pt"))
    assert torch.allclose(torch.stack(losses), torch.stack(own), atol=0, rtol=1e-6) and losses[0] != losses[1]
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-6, rtol=0), name


def check(run: Job, folder: Path, batches: tuple[tuple[int, int], ...], of_two_processes: tuple[tuple[int, int], ...]) -> None:
    for batch_size, accumulate in batches:
        run(folder / f"{batch_size}", {}, batch_size, accumulate)
        same(folder / "8", folder / f"{batch_size}")
    for batch_size, accumulate in of_two_processes:
        two = folder / f"two-{batch_size}"
        assert in_two_processes(run, two, batch_size=batch_size, accumulate=accumulate) == [0, 0]
        for rank in range(2):
            same(folder / "8", two, rank)


@pytest.mark.parametrize("kind", [MultiModalLitModule, ORPOLitModule])
def test_batches_and_processes_do_not_matter(job: Callable[..., Job], tmp_path: Path, kind: type[MultiModalLitModule]) -> None:
    check(job(kind), tmp_path, BATCHES[::2], ((2, 2),))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(MultiModalLitModule, {}, id="sft"),
        pytest.param(DPOLitModule, {}, id="dpo"),
        pytest.param(DPOLitModule, {"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}, id="mpo"),
        pytest.param(DPOLitModule, {"loss_type": "sft"}, id="sft of pairs"),
        pytest.param(MDPOLitModule, {"loss_type": {"sigmoid": 1.0, "sft": 0.5}}, id="mdpo"),
        pytest.param(SimPOLitModule, {}, id="simpo"),
        pytest.param(SimPOLitModule, {"nll_weight": 0.5}, id="simpo with likelihood"),
        pytest.param(CPOLitModule, {}, id="cpo"),
        pytest.param(ORPOLitModule, {}, id="orpo"),
    ],
)
def test_nor_do_they_where_answers_are_compared(
    job: Callable[..., Job], tmp_path: Path, kind: type[MultiModalLitModule], options: dict[str, Any]
) -> None:
    check(job(kind, **options), tmp_path, BATCHES, ((4, 1), (1, 4)))


def test_data_that_cannot_count_ahead_are_refused(tiny_llm: Path, tmp_path: Path) -> None:
    module = make_module(ORPOLitModule, tiny_llm, None)
    with pytest.raises(ValueError, match="2 terms with counts of their own.*a subclass of RowDataModule, got NoneType"):
        make_trainer(tmp_path).fit(module, [])


@pytest.mark.parametrize(("first", "then"), [((8, 1), (2, 4)), ((2, 4), (4, 2))])
def test_a_run_goes_on_with_other_micro_batches(
    tiny_llm: Path, tiny_clip: Path, tmp_path: Path, first: tuple[int, int], then: tuple[int, int]
) -> None:
    """In the middle of an epoch of three steps, the last of four rows."""
    rows = write_pairs(tmp_path / "rows.jsonl", 20)

    def fit(name: str, batch_size: int, accumulate: int, max_steps: int, resume: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(4)
        module = make_module(ORPOLitModule, tiny_llm, tiny_clip, optimizer=sgd(), lr_scheduler=constant)
        steps = {"accumulate_grad_batches": accumulate, "max_steps": max_steps, "max_epochs": 2}
        trainer = make_trainer(tmp_path / name, RunCheckpoint(every_n_train_steps=1), plugins=[CheckpointFile()], **steps)
        data = make_data(module, rows, batch_size=batch_size)
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        assert trainer.global_step == max_steps and data.row_counts()["trained"] == (8 if max_steps == 1 else 16)
        return weights(module)

    expected = fit("whole", 8, 1, max_steps=5)
    start = fit("first", *first, max_steps=1)
    got = fit("then", *then, max_steps=5, resume=tmp_path / "first/checkpoints/last.ckpt")
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, atol=1e-6, rtol=0), name
    assert any(not torch.allclose(start[name], tensor, atol=1e-4) for name, tensor in expected.items())
