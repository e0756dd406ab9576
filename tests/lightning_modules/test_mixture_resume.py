"""A mixture that is stopped anywhere goes on with the rows that it would have had."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from datamodules.mixture import MixtureDataModule
from datamodules.source import Source
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.multimodal import MultiModalLitModule
from models.language import LanguageModel
from tests.lightning_modules.run_fakes import make_trainer, weights, write_rows

Rows = list[list[tuple[str, int]]]


class Seen(Callback):
    """The rows of each batch that was finished."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([(example["source"], example["line"]) for example in batch["examples"]])


@pytest.fixture
def run(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Tensor], Rows]]:
    """`run(folder, resume=None)`: fits for three epochs; the last weights, and the rows of each batch."""
    weight_of = {"a": 0.6, "b": 1.5}
    sources = {
        name: Source(train_path=str(write_rows(tmp_path / f"{name}.jsonl", size)), weight=weight_of[name])
        for name, size in (("a", 5), ("b", 6))
    }

    def fit(folder: Path, resume: Path | None = None) -> tuple[dict[str, Tensor], Rows]:
        torch.manual_seed(4)
        language_model = LanguageModel(str(tiny_llm), tune=Tune(mode="lora", lora=LoRA(dropout=0.3)))
        encoder, steady = HFVisionEncoder(str(tiny_clip), layer=-2), partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
        module = MultiModalLitModule(language_model, encoder, MLPProjector(), lr_scheduler=steady)
        data = MixtureDataModule(sources, batch_size=2, num_workers=2, seed=5, processor=module.processor)
        often, seen = RunCheckpoint(every_n_train_steps=1, save_top_k=-1), Seen()
        trainer = make_trainer(folder, often, seen, max_epochs=3, accumulate_grad_batches=2)
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        return weights(module), seen.rows

    return fit


def test_it_goes_on_from_any_step(run: Callable[..., tuple[dict[str, Tensor], Rows]], tmp_path: Path) -> None:
    expected, rows = run(tmp_path / "whole")
    assert len(rows) == 3 * 6 and len(sum(rows, [])) == 3 * (3 + 9)
    checkpoints = sorted((tmp_path / "whole/checkpoints").glob("epoch*"), key=lambda path: int(path.stem.split("=")[-1]))
    assert len(checkpoints) == 3 * 3
    for number in (1, 2, 5):  # in an epoch, at its end, and after two
        got, rest = run(tmp_path / str(number), checkpoints[number])
        assert rest == rows[2 * (number + 1) :]
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
