"""What stops a fit that would not train, and what it shows of one that does."""

import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from callback_fakes import EOS, Bridge, FakeData, FakeModule, Words, good_batch, make_batch, make_trainer

from encoders.tuning import Tune
from lightning_modules.first_step import FirstStepCheck, PartTable, problem_of_gradients, problem_of_labels

FROZEN = Tune(mode="frozen")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True
    return caplog


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


def test_a_good_first_step_is_one_line(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    data = FakeData([good_batch(), make_batch([[-100, -100, 3, 3]])])  # the second batch is looked at no more
    make_trainer(tmp_path, [FirstStepCheck()]).fit(FakeModule(), datamodule=data)
    lines = [message for message in log.messages if message.startswith("first step")]
    assert lines == [
        "first step: 5 supervised tokens in 2 rows, answers end in their end token, "
        "gradients reach language_model, image_projector and nothing that is frozen"
    ]


def test_every_fit_is_checked(tmp_path: Path) -> None:
    check, module = FirstStepCheck(), FakeModule()
    make_trainer(tmp_path, [check]).fit(module, datamodule=FakeData([good_batch()]))
    module.detach_bridge = True
    with pytest.raises(ValueError, match=r"image_projector .* got no gradient at all"):
        make_trainer(tmp_path, [check]).fit(module, datamodule=FakeData([good_batch()]))


def test_under_accumulation_the_first_backward_counts(tmp_path: Path) -> None:
    module = FakeModule()
    module.detach_bridge = True
    trainer = make_trainer(tmp_path, [FirstStepCheck()], accumulate_grad_batches=3)
    with pytest.raises(ValueError, match="image_projector"):
        trainer.fit(module, datamodule=FakeData([good_batch()] * 3))
    assert trainer.global_step == 0 and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 1


def test_a_bad_batch_stops_before_the_model_sees_it(tmp_path: Path) -> None:
    module = FakeModule()
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(ValueError, match="none of the 4 tokens"):
        make_trainer(tmp_path, [FirstStepCheck()]).fit(module, datamodule=FakeData([make_batch([[-100] * 4])]))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("labels", "segments", "match"),
    [
        ([[-100, 3, EOS]], None, None),
        ([[-100, 3, EOS, -100, 4, EOS]], None, None),  # two turns
        ([[3, EOS, -100, 4, EOS, -100]], [[1, 1, 2, 2, 2, 0]], None),  # packed and padded
        (
            [[-100, 3, EOS], [-100, 4, 4]],
            None,
            r"train.jsonl:2 \(id r1\): the last supervised token .* id 4, which is no end token \(9\)",
        ),
        ([[-100, 3, 5, -100, 4, EOS]], None, r"train.jsonl:1 .* id 5"),  # the first of two turns
        ([[-100, EOS, 3, 3], [3, EOS, 4, EOS]], [[1, 1, 2, 2], [1, 1, 2, 2]], r"train.jsonl:2 \(id r1\)"),
        ([[3, 3, EOS]], [[1, 2, 2]], r"train.jsonl:1 "),  # a run must not go on into the next segment
        ([[-100, -100], [-100, -100]], None, "none of the 4 tokens of the first batch is supervised.* train.jsonl:1"),
    ],
)
def test_problem_of_labels(labels: list[list[int]], segments: list[list[int]] | None, match: str | None) -> None:
    problem = problem_of_labels(make_batch(labels, segments), {EOS})
    assert problem == "" if match is None else re.search(match, problem)


def test_an_answer_that_was_cut_needs_no_end_token() -> None:
    batch = make_batch([[-100, 3, 4], [-100, 3, EOS]])
    assert problem_of_labels(batch, {EOS})
    batch["num_dropped_tokens"] = 7
    assert problem_of_labels(batch, {EOS}) == ""


def backward(module: FakeModule, image: bool = True) -> dict:
    module.log = lambda *args, **options: None  # type: ignore[method-assign]
    batch = good_batch(image)
    module.training_step(batch, 0).backward()
    return batch


def test_gradients_are_well() -> None:
    module = FakeModule()
    batch = backward(module)
    assert problem_of_gradients(module.parts(), batch) == ""
    module.words.embedding.weight.grad = None  # as long as something of the part learns
    assert problem_of_gradients(module.parts(), batch) == ""


def test_without_pictures_their_parts_need_no_gradient() -> None:
    module = FakeModule()
    assert problem_of_gradients(module.parts(), backward(module, image=False)) == ""
    assert "image_projector" in problem_of_gradients(module.parts(), good_batch(image=True))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "only gradients that are exactly 0"),
        (float("nan"), r"image_projector.linear.weight is not finite (1 of the 2"),
        (None, "no gradient at all"),
    ],
)
def test_gradients_that_teach_nothing(value: float | None, said: str) -> None:
    module = FakeModule()
    batch = backward(module)
    linear = module.bridge.linear
    linear.bias.grad = None if value is None else torch.zeros_like(linear.bias)
    linear.weight.grad = None if value is None else torch.full_like(linear.weight, value)
    if value is not None and math.isnan(value):
        linear.bias.grad = torch.ones_like(linear.bias)
        assert problem_of_gradients(module.parts(), batch, may_overflow=True) == ""
    assert said in problem_of_gradients(module.parts(), batch)


def test_a_frozen_part_with_a_gradient() -> None:
    module = FakeModule(bridge=Bridge(FROZEN))
    batch = backward(module)
    assert problem_of_gradients(module.parts(), batch) == ""
    module.bridge.linear.bias.grad = torch.ones(4)
    assert "image_projector.linear.bias is frozen, but got a gradient" in problem_of_gradients(module.parts(), batch)
