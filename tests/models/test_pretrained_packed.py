"""Samples that share a row in ready models compute what they compute alone, with media, M-RoPE and answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules.answer_form import AnswerForm
from datamodules.answer_rows import AnswerExample
from datamodules.batch import Batch, Example
from datamodules.collate import collate
from datamodules.pretrained_processor import PretrainedProcessor
from datamodules.prompt_options import PromptOptions
from lightning_modules.losses import supervised
from models.multimodal import MultiModalModel
from models.pretrained import PretrainedMLLM
from tests.mllm_rows import Row, example_of, rows_of

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "qwen2_audio")

Made = tuple[MultiModalModel, PretrainedProcessor]


@pytest.fixture
def make(model_folder: Callable[[str], Path]) -> Callable[[str], Made]:
    def made(family: str) -> Made:
        language_model = PretrainedMLLM(name_or_path=str(model_folder(family)))
        processor = PretrainedProcessor(str(model_folder(family)), PromptOptions(max_length=4096), language_model)
        model = MultiModalModel(language_model)
        model.build(processor.chat.media_ids)
        return model.eval(), processor

    return made


def slots_of(examples: list[Example]) -> list[int]:
    """Two packs: the last two samples have one of their own."""
    return [0] * (len(examples) - 2) + [1, 1] if len(examples) > 3 else [0] * len(examples)


def packed(examples: list[Example]) -> list[Example]:
    return [replace(example, slot=slot) for example, slot in zip(examples, slots_of(examples), strict=True)]


def loss_of(model: MultiModalModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of the supervised positions, and gradients of a number that is made of them."""
    model.zero_grad()
    hidden_SD, _ = supervised(model(batch), batch["labels_BT"])
    (hidden_SD @ torch.linspace(-1, 1, hidden_SD.shape[1])).sum().backward()
    return hidden_SD.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: MultiModalModel, one: Batch, other: Batch) -> None:
    (hidden_SD, gradients), (expected_SD, expected) = loss_of(model, one), loss_of(model, other)
    torch.testing.assert_close(hidden_SD, expected_SD, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()) + 1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_what_separate_rows_give(family: str, make: Callable[[str], Made]) -> None:
    model, processor = make(family)
    examples = [example_of(row, processor, number) for number, row in enumerate(rows_of(family))]
    together, apart = collate(packed(examples), processor.pad_id), collate(examples, processor.pad_id)
    assert len(together["tokens_BT"]) < len(apart["tokens_BT"])
    assert_same(model, together, apart)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_neighbour_changes_nothing(family: str, make: Callable[[str], Made]) -> None:
    model, processor = make(family)
    examples = [example_of(row, processor, number) for number, row in enumerate(rows_of(family))]
    batch, changed = (collate(packed(examples), processor.pad_id) for _ in range(2))
    last = changed["segments_BT"][0].max()
    is_changed_BT = (changed["segments_BT"] == last) & (changed["labels_BT"] >= 0)
    is_changed_BT[1:] = False
    changed["tokens_BT"][is_changed_BT] = (changed["tokens_BT"][is_changed_BT] + 1) % 300
    with torch.no_grad():
        hidden_BTD, other_BTD = model(batch), model(changed)
    own_BT = changed["segments_BT"] == last
    own_BT[1:] = False
    assert torch.equal(hidden_BTD[~own_BT], other_BTD[~own_BT]) and not torch.equal(hidden_BTD[own_BT], other_BTD[own_BT])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "qwen2_audio"])
def test_pairs_are_packed_like_others(family: str, make: Callable[[str], Made]) -> None:
    model, processor = make(family)
    medium = ("audio", "1.5") if family == "qwen2_audio" else ("image", "60x80")
    batches = []
    for share in (True, False):
        rows = []
        for slot, content in zip((0, 0, 1), (["How many birds are there?"], [medium, "What is this?"], ["A cat?"]), strict=True):
            pair: list[Row] = [[("user", content), ("assistant", [answer])] for answer in ("A red bus waits.", "A cat.")]  # type: ignore[list-item]
            first, second = (example_of(row, processor) for row in pair)
            form, own_slot = AnswerForm("pairs", shared_prompt=share), slot if share else None
            row = AnswerExample(**vars(first), others=[("rejected", second)], form=form)
            rows.append(replace(row, slot=own_slot))
        batches.append(collate(rows, processor.pad_id))
    assert [len(batch["tokens_BT"]) for batch in batches] == [2, 6]
    assert_same(model, *batches)


def test_a_model_whose_images_attend_both_ways_refuses_packs(make: Callable[[str], Made]) -> None:
    model, processor = make("gemma3")
    examples = [example_of(row, processor, number) for number, row in enumerate(rows_of("gemma3"))]
    with pytest.raises(ValueError, match=r"cannot keep the samples of a packed row apart .*set data\.batching\.kind to padded"):
        model(collate(packed(examples), processor.pad_id))
