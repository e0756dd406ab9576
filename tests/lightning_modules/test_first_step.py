"""What stops a fit that would not train, and what it shows of one that does."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from callback_fakes import EOS, Bridge, FakeData, FakeModule, Words, good_batch, make_trainer
from callback_fakes import make_batch as labelled_batch

from datamodules.batch import Batch
from encoders.tuning import LoRA, Tune
from lightning_modules.first_step import FirstStepCheck, problem_of_gradients, problem_of_labels
from lightning_modules.losses import cross_entropy, supervised
from models.multimodal import MultiModalModel

FROZEN = Tune(mode="frozen")


def test_a_good_first_step_is_one_line(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    data = FakeData([good_batch(), labelled_batch([[-100, -100, 3, 3]])])  # the second batch is looked at no more
    make_trainer(tmp_path, [FirstStepCheck()]).fit(FakeModule(), datamodule=data)
    lines = [message for message in log.messages if message.startswith("first step")]
    assert lines == [
        "first step: 5 supervised tokens in 2 rows, answers end in their end token, "
        "gradients reach all that trains of language_model, image_projector and nothing that is frozen"
    ]


def test_every_fit_is_checked(tmp_path: Path) -> None:
    check, module = FirstStepCheck(), FakeModule()
    make_trainer(tmp_path, [check]).fit(module, datamodule=FakeData([good_batch()]))
    module.detach_bridge = True
    with pytest.raises(ValueError, match=r"image_projector .* 2 of its 2 trainable parameters got no gradient"):
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
        make_trainer(tmp_path, [FirstStepCheck()]).fit(module, datamodule=FakeData([labelled_batch([[-100] * 4])]))
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
    problem = problem_of_labels(labelled_batch(labels, segments), {EOS})
    assert problem == "" if match is None else re.search(match, problem)


def test_an_answer_that_was_cut_needs_no_end_token() -> None:
    batch = labelled_batch([[-100, 3, 4], [-100, 3, EOS]])
    assert problem_of_labels(batch, {EOS})
    batch["num_dropped_tokens"] = 7
    assert problem_of_labels(batch, {EOS}) == ""


def backward(module: FakeModule, image: bool = True) -> dict:
    module.log = lambda *args, **options: None  # type: ignore[method-assign]
    batch = good_batch(image)
    module.training_step(batch, 0).backward()
    return batch


def test_each_parameter_needs_a_gradient() -> None:
    module = FakeModule()
    batch = backward(module)
    assert problem_of_gradients(module.parts(), batch) == ""
    module.words.embedding.weight.grad = None
    problem = problem_of_gradients(module.parts(), batch)
    assert problem.startswith("language_model (tune.mode full): 1 of its 3 trainable parameters got no gradient")
    assert "(embedding.weight)" in problem
    module.words.embedding.weight.requires_grad_(False)  # not used, and so frozen by its build()
    assert problem_of_gradients(module.parts(), batch) == ""
    module.words.embedding.weight.requires_grad_(True).grad = torch.zeros(10, 4)  # as long as something of the part learns
    assert problem_of_gradients(module.parts(), batch) == ""


def test_without_pictures_their_parts_need_no_gradient() -> None:
    module = FakeModule()
    batch = backward(module, image=False)
    parts = module.parts()
    assert problem_of_gradients(parts, batch) == ""
    nested = {"language_model": parts["language_model"], "image_projector.inner": parts["image_projector"]}
    assert problem_of_gradients(nested, batch) == ""
    assert "image_projector" in problem_of_gradients(parts, good_batch(image=True))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "it got only gradients that are exactly 0"),
        (float("nan"), "1 of its 2 gradients are not finite (linear.weight)"),
        (None, "2 of its 2 trainable parameters got no gradient from the first batch (linear.weight, linear.bias)"),
    ],
)
def test_gradients_that_teach_nothing(value: float | None, said: str) -> None:
    module = FakeModule()
    batch = backward(module)
    linear = module.bridge.linear
    linear.bias.grad = None if value is None else torch.zeros_like(linear.bias)
    linear.weight.grad = None if value is None else torch.full_like(linear.weight, value)
    if value is not None and math.isnan(value):
        assert problem_of_gradients(module.parts(), batch, may_overflow=True) == ""
    problem = problem_of_gradients(module.parts(), batch)
    assert problem.startswith(f"image_projector (tune.mode full): {said}")


def test_behind_a_shut_gate_nothing_is_known_yet() -> None:
    module = FakeModule()
    batch = backward(module)
    module.bridge.linear.bias.grad = torch.zeros(4)
    module.bridge.linear.weight.grad = torch.zeros(4, 3)

    class Gates(Words):
        @property
        def gates(self) -> dict[str, torch.nn.Parameter]:
            return {"head.bias": self.head.bias}

    gates, frozen = Gates(), Gates(FROZEN)
    for parameter in gates.parameters():
        parameter.grad = torch.ones_like(parameter)
    for part in (gates, frozen):
        part.head.bias.data.zero_()
    parts = {**module.parts(), "fusion": gates}
    gates.head.bias.grad.zero_()
    assert problem_of_gradients(parts, batch).startswith("the gates of fusion are 0 and got only gradients that are exactly 0")
    gates.head.bias.grad.fill_(1)
    assert problem_of_gradients(parts, batch) == ""
    module.bridge.linear.bias.grad = None  # not even 0
    assert problem_of_gradients(parts, batch).startswith("image_projector (tune.mode full): 1 of its 2 trainable parameters")
    module.bridge.linear.bias.grad = torch.zeros(4)
    assert "the gates of fusion (tune.mode frozen) are 0 and do" in problem_of_gradients({**parts, "fusion": frozen}, batch)
    for parameter in module.words.parameters():  # the language model is not behind it
        parameter.grad = torch.zeros_like(parameter)
    assert "language_model" in problem_of_gradients(parts, batch)


@pytest.mark.parametrize("use_dora", [False, True])
def test_each_adapter_learns(
    make_model: Callable[..., MultiModalModel], make_batch: Callable[..., Batch], use_dora: bool
) -> None:
    lora = LoRA(target_modules=("q_proj", "v_proj"), use_dora=use_dora)
    model = make_model(tune=Tune(mode="lora", lora=lora), encoder_tune=Tune(mode="lora", lora=lora))
    adapters = dict(model.named_parameters())
    batch = make_batch([[3, "a", 4], [5, 2]])
    for name, parameter in adapters.items():
        if "lora_B" in name:
            parameter.data.zero_()  # as at the start of a run
    model(batch).square().sum().backward()
    b_first = "language_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"
    assert not adapters[b_first.replace("lora_B", "lora_A")].grad.any()  # its A gets 0 while its B is 0
    assert problem_of_gradients(model.parts(), batch) == ""
    for name, parameter in adapters.items():
        if name.startswith(b_first.partition(".lora_")[0]) and parameter.grad is not None:
            parameter.grad.zero_()
    problem = problem_of_gradients(model.parts(), batch)
    silent = "1 of its 4 adapters (model.model.layers.1.self_attn.v_proj) got only gradients that are exactly 0"
    assert problem.startswith(f"language_model (tune.mode lora): {silent}")
    adapters[b_first].grad = None
    assert "trainable parameters got no gradient" in problem_of_gradients(model.parts(), batch)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj", "granite", "cohere"])
def test_no_parameter_of_a_model_that_trains_in_full_is_left_out(
    model_folder: Callable[[str], Path],
    make_model: Callable[..., MultiModalModel],
    make_batch: Callable[..., Batch],
    family: str,
) -> None:
    model = make_model(llm=model_folder(family), tune=Tune(), encoder_tune=Tune(), pretrained=True).train()
    batch = make_batch([[3, "a", 4], [5, 2]])
    hidden_SD, labels_S = supervised(model(batch), batch["labels_BT"])
    cross_entropy(hidden_SD, model.language_model.head, labels_S)[0].backward()
    assert problem_of_gradients(model.parts(), batch) == ""


def test_a_frozen_part_with_a_gradient() -> None:
    module = FakeModule(bridge=Bridge(FROZEN))
    batch = backward(module)
    assert problem_of_gradients(module.parts(), batch) == ""
    module.bridge.linear.bias.grad = torch.ones(4)
    assert "image_projector.linear.bias is frozen, but got a gradient" in problem_of_gradients(module.parts(), batch)
