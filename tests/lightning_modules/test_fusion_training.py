"""Fits with gated cross-attention: what is checked, saved, measured, and shared between processes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.batch import Batch
from datamodules.processor import Processor
from encoders.projectors import LinearProjector
from encoders.tuning import Tune
from lightning_modules.checkpoints import RunCheckpoint
from lightning_modules.first_step import FirstStepCheck
from lightning_modules.multimodal import MultiModalLitModule
from lightning_modules.part_table import PartTable
from models.checkpoint import read_checkpoint
from models.cross_attention import GatedCrossAttentionFusion
from models.multimodal import MultiModalModel
from tests.lightning_modules.processes import in_two_processes
from tests.lightning_modules.run_fakes import Watch, batches, examples, make_data, make_trainer, weights, write_rows

pytestmark = pytest.mark.usefixtures("seed")

MakeModule = Callable[..., MultiModalLitModule]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 8)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True
    return caplog


def crossing(tune: Tune = Tune(mode="full")) -> GatedCrossAttentionFusion:  # it is frozen
    return GatedCrossAttentionFusion(every=1, num_heads=2, head_dim=4, tune=tune)


def hugging_face_loss(llm: Path, batch: Batch) -> float:
    """The loss of the language model on the tokens of a batch, which are those of text alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llm).eval()
    with torch.no_grad():
        mask_BT = (batch["segments_BT"] > 0).long()
        return float(model(input_ids=batch["tokens_BT"], attention_mask=mask_BT, labels=batch["labels_BT"]).loss)


def test_a_fit(make_lit_module: MakeModule, tiny_llm: Path, rows: Path, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    module, losses, gates = make_lit_module(fusion=crossing(), warmup_ratio=0.3), [], []
    data = make_data(module, rows, val_path=str(rows), shuffle=False)

    def look(trainer: Any, pl_module: MultiModalLitModule) -> None:
        losses.append(float(trainer.callback_metrics["train/loss"]))
        gates.append(pl_module.model.fusion.is_shut)

    trainer = make_trainer(tmp_path, PartTable(), FirstStepCheck(), RunCheckpoint(), Watch(look), max_epochs=2)
    trainer.fit(module, data)
    first = data.collate(examples(data)[:2])
    assert losses[0] == pytest.approx(hugging_face_loss(tiny_llm, first), rel=1e-5) and "image" in first
    assert gates[0] and not gates[1]  # in the first step of the warm-up the learning rate is 0
    lines = [message for message in log.messages if message.startswith(("first step", "step"))]
    assert len(lines) == 2
    assert "that trains of language_model, fusion and nothing that is frozen; what lies before the gates of fusion" in lines[0]
    assert (
        lines[1]
        == "step 2: gradients reach all that trains of language_model, image_projector, fusion and nothing that is frozen"
    )
    (row,) = [row for row in json.loads((tmp_path / "parts.json").read_text()) if row["part"] == "fusion"]
    assert row["class"] == "GatedCrossAttentionFusion" and row["trainable"] == row["parameters"] > 0

    path = tmp_path / "checkpoints/last.ckpt"
    checkpoint = read_checkpoint(path)
    names = {f"fusion.{name}" for name in module.model.fusion.state_dict()}
    assert names == {name for name in checkpoint["state_dict"] if name.startswith("fusion.")}
    again, processor = MultiModalModel.from_checkpoint(path), Processor.from_files(checkpoint["processor"])
    assert processor.num_tokens("image", (32, 32)) == 0
    module.eval()
    for batch in batches(data)[:2]:
        assert torch.equal(again(batch), module(batch))


def test_media_gain_is_nothing_while_the_gates_are_shut(make_lit_module: MakeModule, rows: Path, tmp_path: Path) -> None:
    module = make_lit_module(fusion=crossing())
    trainer = make_trainer(tmp_path)
    (metrics,) = trainer.test(module, make_data(module, rows), verbose=False)
    assert metrics["test/media_gain"] == 0
    for block in module.model.fusion.blocks.values():
        block.get_parameter("attention_gate").data.fill_(3)
    (opened,) = trainer.test(module, make_data(module, rows), verbose=False)
    assert opened["test/media_gain"] != 0 and opened["test/loss"] != metrics["test/loss"]


class Dead(LinearProjector):
    """Its weights count for nothing."""

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        embeddings_BMD, mask_BM = super().forward(features_BND, mask_BN)
        return embeddings_BMD * 0 + torch.arange(32.0), mask_BM


class Constant(Dead):
    """It gives 0, which says nothing to a block."""

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        embeddings_BMD, mask_BM = super().forward(features_BND, mask_BN)
        return embeddings_BMD * 0, mask_BM


class Detached(LinearProjector):
    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        embeddings_BMD, mask_BM = super().forward(features_BND, mask_BN)
        return embeddings_BMD.detach(), mask_BM


@pytest.mark.parametrize(
    ("projector", "said", "step"),
    [
        (Detached, r"image_projector .* 2 of its 2 trainable parameters got no gradient", 0),
        (Constant, r"the gates of fusion are 0 and got only gradients that are exactly 0", 0),
        (Dead, r"image_projector .* it got only gradients that are exactly 0", 2),  # seen when the gates have opened
    ],
)
def test_a_projector_that_does_not_learn_is_found(
    make_lit_module: MakeModule, rows: Path, tmp_path: Path, projector: type[LinearProjector], said: str, step: int
) -> None:
    module = make_lit_module(fusion=crossing(), image_projector=projector(), warmup_ratio=0.4)
    trainer = make_trainer(tmp_path, FirstStepCheck())
    with pytest.raises(ValueError, match=said):
        trainer.fit(module, make_data(module, rows))
    assert trainer.global_step == step


def test_frozen_gates_must_come_from_another_run(make_lit_module: MakeModule, rows: Path, tmp_path: Path) -> None:
    first = make_lit_module(fusion=crossing())
    make_trainer(tmp_path / "first", RunCheckpoint()).fit(first, make_data(first, rows))
    frozen = {"fusion": crossing(Tune(mode="frozen"))}
    shut = make_lit_module(**frozen)
    with pytest.raises(ValueError, match=r"the gates of fusion \(tune.mode frozen\) are 0 and do not train.*model\.init_from"):
        make_trainer(tmp_path / "shut", FirstStepCheck()).fit(shut, make_data(shut, rows))
    second = make_lit_module(**frozen, init_from=str(tmp_path / "first/checkpoints/last.ckpt"))
    make_trainer(tmp_path / "second", FirstStepCheck(), RunCheckpoint()).fit(second, make_data(second, rows))
    before, after = first.model.fusion.state_dict(), second.model.fusion.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = MultiModalModel.from_checkpoint(tmp_path / "second/checkpoints/last.ckpt")
    assert all(torch.equal(again.fusion.state_dict()[name], tensor) for name, tensor in before.items())


def test_two_processes_do_what_one_does(make_lit_module: MakeModule, rows: Path, tmp_path: Path) -> None:
    """Every fifth row has no picture, so in some steps one of the two has a use for the blocks and the other none."""

    def train(folder: Path, options: dict[str, Any], batch_size: int) -> None:
        torch.manual_seed(4)
        module = make_lit_module(fusion=crossing(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
        trainer = make_trainer(folder, FirstStepCheck(), **options)
        trainer.fit(module, make_data(module, rows, batch_size=batch_size))
        torch.save(weights(module), folder / f"{trainer.global_rank}.pt")

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    train(tmp_path / "one", {}, 2)
    assert in_two_processes(lambda options: train(tmp_path / "two", options, 1)) == [0, 0]
    expected = torch.load(tmp_path / "one/0.pt", weights_only=True)
    assert expected["fusion.blocks.0.attention_gate"].abs() > 1e-3
    for rank in range(2):
        for name, tensor in torch.load(tmp_path / f"two/{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
