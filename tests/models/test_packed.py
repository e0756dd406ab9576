"""Samples that share a row compute what they compute alone: losses, gradients, with media, answers and cross-attention.

Shape suffixes: B rows, T tokens, S supervised positions.
"""

from dataclasses import replace

import pytest
import torch
from conftest import MEDIA_TOKEN_IDS, NUM_PATCHES, _example, _pixels
from torch import Tensor

from datamodules.answer_rows import AnswerExample
from datamodules.batch import IGNORE_INDEX, Example, Origin, answers_of_positions
from datamodules.collate import collate
from encoders.tuning import Tune
from lightning_modules.losses import cross_entropy, supervised
from models.cross_attention import GatedCrossAttentionFusion
from tests.tiny_configs import VOCABULARY

LAYOUTS = [[5, "a", 7, 4], [2, "a", 3, "b", 2, 6], [6, 3], [3, "c", 2], [9, 5]]
SLOTS = [0, 0, 1, 1, 1]


def examples_of(layouts=LAYOUTS, placeholders: int = NUM_PATCHES, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    media = {name: _pixels(generator) for name in "abc"}
    return [_example(number, layout, media, placeholders, generator) for number, layout in enumerate(layouts)]


def packed(examples: list[Example], slots=SLOTS) -> list[Example]:
    return [replace(example, slot=slot) for example, slot in zip(examples, slots, strict=True)]


def loss_of(model, batch) -> Tensor:
    hidden_SD, labels_S = supervised(model(batch), batch["labels_BT"])
    total, count, _ = cross_entropy(hidden_SD, model.language_model.head, labels_S)
    return total / count


def gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(model, one, other) -> None:
    loss, expected = loss_of(model, one), loss_of(model, other)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert any("projector" in name for name in assert_same_gradients(model, loss, expected))


def assert_same_gradients(model, one: Tensor, other: Tensor) -> dict[str, Tensor]:
    """Those of the sums of their squares."""
    one.square().sum().backward()
    got = gradients(model)
    other.square().sum().backward()
    wanted = gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * max(1.0, float(gradient.abs().max())), msg=name)
    return got


def test_a_packed_batch_as_literal_tensors():
    one = Example(Origin("f", 1), "1", [5, 6, 7], [-100, 6, 7])
    two = Example(Origin("f", 2), "2", [8, 9], [-100, 9], choices=[[9, 4]])
    three = Example(Origin("f", 3), "3", [1, 2], [-100, 2])
    batch = collate([replace(one, slot=0), replace(two, slot=0), replace(three, slot=1)], pad_id=0)
    assert batch["tokens_BT"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 0, 0, 0]]
    assert batch["labels_BT"].tolist() == [[-100, 6, 7, -100, 9], [-100, 2, -100, -100, -100]]
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert batch["choices_SK"].tolist() == [[-1, -1], [-1, -1], [9, 4], [-1, -1]]
    assert [example["line"] for example in batch["examples"]] == [1, 2, 3]
    assert (batch["num_tokens"], batch["num_supervised"]) == (7, 4)


def test_media_stand_where_their_samples_do():
    examples = examples_of()
    batch = collate(packed(examples), pad_id=0)
    media = batch["image"]
    assert media["row_O"].tolist() == [0, 0, 0, 1]
    assert media["item_O"].tolist() == [0, 0, 1, 2]
    first, third = len(examples[0].tokens), len(examples[2].tokens)
    assert media["position_O"].tolist() == [5, first + 2, first + 2 + NUM_PATCHES + 3, third + 3]
    for row, position in zip(media["row_O"], media["position_O"], strict=True):
        assert (batch["tokens_BT"][row, position : position + NUM_PATCHES] == MEDIA_TOKEN_IDS["image"]).all()


FAMILIES = ("llama", "qwen2", "qwen2_window", "mistral", "gemma2", "gemma3_text", "gpt2")
"""Of which four have windows that are shorter than the samples; Gemma 2 does not attend in blocks."""


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_rows_of_their_own(family, make_model, model_folder):
    model, examples = make_model(model_folder(family), tune=Tune(mode="full" if family == "gpt2" else "lora")), examples_of()
    assert_same(model, collate(packed(examples), pad_id=0), collate(examples, pad_id=0))


def assert_a_neighbour_changes_nothing(model, examples: list[Example], others: list[Example]) -> None:
    """The second sample of the first row becomes another one of the same length."""
    changed = [examples[0], others[1], *examples[2:]]
    with torch.no_grad():
        one, other = (model(collate(packed(rows), pad_id=0)) for rows in (examples, changed))
    size = len(examples[0].tokens)
    assert torch.equal(one[0, :size], other[0, :size])
    assert not torch.equal(one[0, size:], other[0, size:])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_changes_nothing(family, make_model, model_folder):
    model = make_model(model_folder(family), tune=Tune(mode="frozen"))
    assert_a_neighbour_changes_nothing(model, examples_of(), examples_of(seed=9))


@pytest.mark.parametrize("attend_to", ["last", "all"])
def test_cross_attention_looks_at_the_media_of_its_own_sample(make_model, attend_to):
    model = make_model(fusion=GatedCrossAttentionFusion(every=1, attend_to=attend_to))
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            parameter.data.fill_(0.7)
    examples, others = examples_of(placeholders=0), examples_of(placeholders=0, seed=9)
    for example in [*examples, *others]:
        example.tokens = [token for token in example.tokens if token < VOCABULARY]
    assert_same(model, collate(packed(examples), pad_id=0), collate(examples, pad_id=0))
    assert_a_neighbour_changes_nothing(model, examples, others)


def answers(number: int, generator: torch.Generator) -> AnswerExample:
    """A prompt with two answers, which share it."""
    prompt, good, bad = (torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in (12, 4, 6))
    sides = [
        Example(Origin("f", number), str(number), prompt + answer, [IGNORE_INDEX] * len(prompt) + answer)
        for answer in (good, bad)
    ]
    return AnswerExample(**vars(sides[0]), role="chosen", others=[("rejected", sides[1])])


def logps_by_answer(model, batch) -> Tensor:
    hidden_SD, labels_S = supervised(model(batch), batch["labels_BT"])
    logps_S = model.language_model.head(hidden_SD).log_softmax(-1).gather(1, labels_S[:, None])[:, 0]
    answer_S = answers_of_positions(batch)
    return torch.zeros(len(batch["answers"]["roles"])).index_add(0, answer_S, logps_S)


@pytest.mark.parametrize("takes_branches", [True, False])
def test_pairs_are_packed_like_others(make_model, takes_branches):
    model, generator = make_model(images=False), torch.Generator().manual_seed(2)
    assert model.language_model.takes_packs
    model.language_model.takes_branches = takes_branches  # False: as with flash attention, each is read in a row of its own
    pairs = [answers(number, generator) for number in range(1, 4)]
    together = collate([replace(pair, slot=slot) for pair, slot in zip(pairs, [0, 0, 1], strict=True)], pad_id=0)
    apart = collate(pairs, pad_id=0)
    assert together["answers"]["row_A"].tolist() == [0, 0, 0, 0, 1, 1]
    assert together["answers"]["branch_A"].tolist() == [1, 2, 3, 4, 1, 2]
    assert together["answers"]["example_A"] == apart["answers"]["example_A"] == [0, 0, 1, 1, 2, 2]
    logps_A, apart_A = logps_by_answer(model, together), logps_by_answer(model, apart)
    torch.testing.assert_close(logps_A, apart_A, rtol=1e-5, atol=1e-5)
    assert_same_gradients(model, logps_A[0::2] - logps_A[1::2], apart_A[0::2] - apart_A[1::2])
    changed = [pairs[0], answers(2, torch.Generator().manual_seed(9)), pairs[2]]
    other_A = logps_by_answer(
        model, collate([replace(pair, slot=slot) for pair, slot in zip(changed, [0, 0, 1], strict=True)], 0)
    )
    assert torch.equal(logps_A[[0, 1, 4, 5]], other_A[[0, 1, 4, 5]]) and not torch.equal(logps_A[2:4], other_A[2:4])


def test_a_model_that_cannot_keep_samples_apart_refuses_them(make_model):
    model = make_model(images=False)
    model.language_model.takes_packs = False
    examples = examples_of([[6, 3], [5, 2]])
    with pytest.raises(ValueError, match=r"cannot keep the samples of a packed row apart .*: set data\.batching\.kind to padded"):
        model(collate(packed(examples, [0, 0]), pad_id=0))
