"""The table of what trains, and what it refuses or warns of."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from callback_fakes import Bridge, FakeData, FakeModule, Words, good_batch, make_trainer

from encoders.base import Part
from encoders.tuning import Tune
from lightning_modules.part_table import PartTable, unused_lr

FROZEN = Tune(mode="frozen")


def test_part_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, [PartTable()]).fit(FakeModule(bridge=Bridge(FROZEN)), datamodule=FakeData([good_batch()]))
    rows = json.loads((tmp_path / "parts.json").read_text())
    words = {"part": "language_model", "class": "Words", "mode": "full", "parameters": 90, "trainable": 90}
    bridge = {"part": "image_projector", "class": "Bridge", "mode": "frozen", "parameters": 16, "trainable": 0}
    # the optimizer's own learning rate, not the one that tune asks for
    assert rows == [{**words, "lr": 0.05, "dtype": "float32"}, {**bridge, "lr": None, "dtype": "float32"}]
    shown = capsys.readouterr().out
    assert "image_projector" in shown and "106" in shown


def test_part_table_shows_the_rate_before_warm_up(tmp_path: Path) -> None:
    class Warming(FakeModule):
        def configure_optimizers(self) -> dict:
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)}

    make_trainer(tmp_path, [PartTable()]).fit(Warming(), datamodule=FakeData([good_batch()]))
    assert [row["lr"] for row in json.loads((tmp_path / "parts.json").read_text())] == [0.05, 0.05]


@pytest.mark.parametrize(
    ("words", "bridge", "match"),
    [
        (Words(FROZEN), Bridge(FROZEN), "nothing trains: every part is frozen"),
        (Words(), Bridge(Tune(mode="lora")), r"image_projector \(Bridge\) has tune.mode lora, but none of its 16"),
        (
            Words(FROZEN).requires_grad_(),
            Bridge(),
            "language_model .* has tune.mode frozen, but 90 of its parameters would train",
        ),
    ],
)
def test_part_table_refuses(tmp_path: Path, words: Words, bridge: Bridge, match: str) -> None:
    module = FakeModule(words, bridge)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, [PartTable()]).fit(module, datamodule=FakeData([good_batch()]))
    assert not (tmp_path / "parts.json").exists()


class Frames(Part):
    """A part that has no weights but those of the part that it is made of."""

    def __init__(self, frames: Bridge, tune: Tune = Tune()) -> None:
        super().__init__(tune)
        self.frames = frames


def test_a_part_counts_without_the_parts_that_it_is_made_of(tmp_path: Path) -> None:
    module = FakeModule()
    shell = Frames(Bridge(FROZEN))
    module.parts = lambda: {"language_model": module.words, "video_encoder": shell, "video_encoder.frames": shell.frames}  # type: ignore[method-assign]
    make_trainer(tmp_path, [PartTable()]).fit(module, datamodule=FakeData([good_batch()]))
    rows = json.loads((tmp_path / "parts.json").read_text())
    assert [(row["part"], row["parameters"], row["trainable"]) for row in rows] == [
        ("language_model", 90, 90),
        ("video_encoder", 0, 0),
        ("video_encoder.frames", 16, 0),
    ]


def test_a_learning_rate_that_no_part_takes_is_named(tmp_path: Path) -> None:
    own, others = Tune(lr=3e-3), Tune(lr=2e-5)
    module = FakeModule(Words(own), Bridge(others))
    with pytest.warns(UserWarning, match=r"model.optimizer has lr 0.05, but no part takes it.*language_model 0.003, image_pro"):
        make_trainer(tmp_path, [PartTable()]).fit(module, datamodule=FakeData([good_batch()]))
    parts = module.parts()
    assert unused_lr(parts, 2e-4) == ""  # nobody asked for it: it is the default
    assert unused_lr(parts, None) == ""
    frozen = {**parts, "image_encoder": Bridge(FROZEN)}  # needs none
    assert "image_encoder" not in unused_lr(frozen, 0.1) != ""
    assert unused_lr({**parts, "image_encoder": Bridge()}, 0.1) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unused_lr({"language_model": Words()}, 0.1) == ""
