"""Answers that share their prompt give what each gives alone: hidden states, loss, gradients.

Shape suffixes: B rows, T tokens, U tokens that are looked at, S supervised positions, D hidden size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.answer_form import AnswerForm
from datamodules.answer_rows import AnswerExample
from datamodules.batch import IGNORE_INDEX, Batch, Example, MediaItem, Origin
from datamodules.collate import collate
from encoders.tuning import Tune
from lightning_modules.losses import cross_entropy, supervised
from models.attention_mask import attention_mask, visible
from models.branches import take_apart
from models.cross_attention import GatedCrossAttentionFusion
from models.language import LanguageModel
from models.multimodal import MultiModalModel
from tests.conftest import IMAGE_TOKEN, NUM_PATCHES
from tests.tiny_configs import IMAGE_SIZE, VOCABULARY

Build = Callable[[str], MultiModalModel]

FAMILIES = ("llama", "qwen2", "gemma2", "gpt2", "granite", "cohere", "gptj")
EAGER = ("gemma2",)
"""Those that attend by it."""
X = IGNORE_INDEX


@pytest.fixture
def build(model_folder: Callable[[str], Path], make_model: Callable[..., MultiModalModel]) -> Build:
    """`build(family)`: with LoRA, whose B is not 0; GPT-2, whose layers are no linear ones, trains in full."""

    def make(family: str) -> MultiModalModel:
        return make_model(model_folder(family), tune=Tune(mode="full" if family == "gpt2" else "lora"))

    return make


def random_tokens(generator: torch.Generator, size: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()


def side(prompt: list[int], answer: list[int], items: Sequence[MediaItem] = ()) -> Example:
    media = {"image": list(items)} if items else {}
    return Example(Origin("rows.jsonl", 1), "row", prompt + answer, [X] * len(prompt) + answer, media)


def pairs(generator: torch.Generator, share: bool, placeholders: int = 0, num_rejected: int = 2) -> list[AnswerExample]:
    """Two rows of several answers; with placeholders the first has a picture, the second two."""
    rows = []
    for number, sizes in enumerate(((4, 3, 6), (2, 5, 1))):
        prompt, items = random_tokens(generator, 7), []
        for place in range(number + 1 if placeholders is not None else 0):
            pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
            items.append(MediaItem(f"{number}.{place}", pixels, placeholders, len(prompt)))
            prompt += [IMAGE_TOKEN] * placeholders + random_tokens(generator, 5)
        first, *others = (side(prompt, random_tokens(generator, size), items) for size in sizes[: num_rejected + 1])
        form = AnswerForm("pairs", shared_prompt=share)
        rows.append(AnswerExample(**vars(first), role="chosen", others=[("rejected", other) for other in others], form=form))
    return rows


def text_pairs(seed: int, share: bool) -> Batch:
    rows = pairs(torch.Generator().manual_seed(seed), share, placeholders=0)
    for row in rows:
        row.media = {}
        row.others = [(role, side_without_media(other)) for role, other in row.others]
    return collate(rows, pad_id=0)


def side_without_media(example: Example) -> Example:
    example.media = {}
    return example


def image_pairs(seed: int, share: bool, placeholders: int = NUM_PATCHES) -> Batch:
    return collate(pairs(torch.Generator().manual_seed(seed), share, placeholders), pad_id=0)


def loss_of(model: MultiModalModel, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states of the supervised positions, a weighted loss, and its gradients by name."""
    model.zero_grad()
    hidden_SD, labels_S = supervised(model(batch), batch["labels_BT"])
    language_model = model.language_model
    total, _, _ = cross_entropy(
        hidden_SD, language_model.head, labels_S, softcap=language_model.softcap, scale=language_model.logit_scale
    )
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden_SD.detach(), total.detach(), gradients


def in_float64(model: MultiModalModel, *batches: Batch) -> None:
    """Some norms and adapters of transformers and PEFT go on in float32, and round the gradients."""
    model.double()
    for batch in batches:
        if "image" in batch:
            batch["image"]["media"] = batch["image"]["media"].double()


def assert_equal_results(model: MultiModalModel, shared: Batch, apart: Batch, eager: bool = False) -> None:
    assert len(shared["tokens_BT"]) == 2 and len(apart["tokens_BT"]) == 6
    assert shared["answers"]["keys"] == apart["answers"]["keys"]
    error = 1e-6
    if not eager:  # which in float64 makes nan of the padding of transformers' own rows
        in_float64(model, shared, apart)
        error = 1e-10
    hidden_SD, loss, gradients = loss_of(model, shared)
    expected_SD, expected_loss, expected = loss_of(model, apart)
    torch.testing.assert_close(hidden_SD, expected_SD, rtol=10 * error, atol=error * float(expected_SD.abs().max()))
    torch.testing.assert_close(loss, expected_loss, rtol=error, atol=error)
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5, atol=4e-6 * scale + 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_text_behind_a_shared_prompt(family: str, build: Build) -> None:
    model = build(family)
    assert model.language_model.takes_branches
    assert_equal_results(model, text_pairs(1, True), text_pairs(1, False), family in EAGER)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_in_a_shared_prompt(family: str, build: Build) -> None:
    assert_equal_results(build(family), image_pairs(2, True), image_pairs(2, False), family in EAGER)


@pytest.mark.parametrize("attend_to", ["all", "last"])
def test_pictures_beside_a_shared_prompt(attend_to: Any, make_model: Callable[..., MultiModalModel]) -> None:
    fusion = GatedCrossAttentionFusion(every=1, attend_to=attend_to, num_heads=2, head_dim=8)
    model = make_model(fusion=fusion)
    for gate in fusion.gates.values():
        torch.nn.init.constant_(gate, 0.7)
    assert_equal_results(model, image_pairs(3, True, 0), image_pairs(3, False, 0))


def own_media(placeholders: int) -> list[Example]:
    """An answer that is followed by a picture of its own, and another that is followed by another picture."""
    generator = torch.Generator().manual_seed(8)
    prompt = random_tokens(generator, 20)
    sides = []
    for number in range(2):
        example = side(prompt, random_tokens(generator, 3))
        pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        example.media = {"image": [MediaItem(str(number), pixels, placeholders, len(example.tokens))]}
        end = random_tokens(generator, 4)
        example.tokens += [IMAGE_TOKEN] * placeholders + end
        example.labels += [X] * placeholders + end
        sides.append(example)
    return sides


@pytest.mark.parametrize("fusion", [None, GatedCrossAttentionFusion(every=1, num_heads=2, head_dim=8)])
def test_pictures_within_the_branches(fusion: Any, make_model: Callable[..., MultiModalModel]) -> None:
    model = make_model(fusion=fusion)
    for gate in model.fusion.gates.values():
        torch.nn.init.constant_(gate, 0.7)
    losses = []
    for share in (True, False):
        first, second = own_media(NUM_PATCHES if fusion is None else 0)
        row = AnswerExample(**vars(first), others=[("rejected", second)], form=AnswerForm("pairs", shared_prompt=share))
        batch = collate([row], pad_id=0)
        assert len(batch["tokens_BT"]) == (1 if share else 2)
        in_float64(model, batch)
        losses.append(loss_of(model, batch))
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-10, atol=1e-10)


def test_a_model_that_carries_a_state_reads_each_answer_in_a_row_of_its_own(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "logit_scale", 0.5)  # its head has a factor that is not known
    model = build("falcon_h1")
    assert not model.language_model.takes_branches
    assert_equal_results(model, image_pairs(4, True), image_pairs(4, False))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_changed_rejected_answer_changes_nothing_in_the_chosen_one(family: str, build: Build) -> None:
    model = build(family)
    batch, changed = image_pairs(5, True), image_pairs(5, True)
    rejected_BT = changed["branches_BT"] >= 2
    changed["tokens_BT"][rejected_BT] = (changed["tokens_BT"][rejected_BT] + 1) % VOCABULARY
    with torch.no_grad():
        hidden_BTD, other_BTD = model(batch), model(changed)
    unchanged_BT = batch["branches_BT"] == 1
    assert torch.equal(hidden_BTD[unchanged_BT], other_BTD[unchanged_BT])
    assert not torch.equal(hidden_BTD[rejected_BT], other_BTD[rejected_BT])


def test_media_are_encoded_once_a_pair(make_model: Callable[..., MultiModalModel]) -> None:
    model = make_model()
    seen: list[int] = []
    features = model.image_encoder.features
    model.image_encoder.features = lambda media, *rest: (seen.append(len(media)), features(media, *rest))[1]  # type: ignore[method-assign]
    for share in (True, False):
        seen.clear()
        model(image_pairs(6, share))
        assert sum(seen) == 3  # the first row has one picture, the second two; each has three answers


def test_taking_apart_gives_the_rows_that_are_not_shared() -> None:
    shared, alone = image_pairs(7, True), image_pairs(7, False)
    apart = take_apart(shared)
    assert apart.batch["tokens_BT"].tolist() == alone["tokens_BT"].tolist()
    assert apart.batch["positions_BT"].tolist() == alone["positions_BT"].tolist()
    assert apart.batch["segments_BT"].tolist() == alone["segments_BT"].tolist()
    for name in ("item_O", "row_O", "num_tokens_O", "position_O"):
        assert apart.batch["image"][name].tolist() == alone["image"][name].tolist()  # type: ignore[literal-required]
    real_BT = shared["segments_BT"] > 0
    tokens_BTD = apart.join(apart.batch["tokens_BT"][..., None])
    assert torch.equal(tokens_BTD[..., 0][real_BT], shared["tokens_BT"][real_BT])


def test_who_sees_whom() -> None:
    segments_BT = torch.tensor([[1, 1, 1, 1, 2, 2, 0]])
    branches_BT = torch.tensor([[0, 1, 1, 2, 0, 1, 0]])
    positions_BT = torch.tensor([[0, 1, 2, 1, 0, 1, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert visible(segments_BT, branches_BT, positions_BT)[0].int().tolist() == expected
    near = visible(segments_BT, branches_BT, positions_BT, window=2)[0].int().tolist()
    assert near[2] == [0, 1, 1, 0, 0, 0, 0] and near[3] == expected[3]
    mask = attention_mask(segments_BT, branches_BT, positions_BT, {"full_attention": None, "sliding_attention": 2}, torch.float32)
    assert isinstance(mask, dict) and mask.keys() == {"full_attention", "sliding_attention"}
    assert torch.equal(mask["full_attention"] == 0, visible(segments_BT, branches_BT, positions_BT)[:, None])
    assert (
        mask["sliding_attention"][0, 0, 2].tolist()
        == [torch.finfo(torch.float32).min, 0, 0] + [torch.finfo(torch.float32).min] * 4
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_several_samples_in_a_row(family: str, build: Build, generator: torch.Generator) -> None:
    language_model = build(family).language_model
    samples = [random_tokens(generator, size) for size in (6, 9, 4)]
    tokens_BT = torch.tensor([sum(samples, [])])
    segments_BT = torch.tensor([[1] * 6 + [2] * 9 + [3] * 4])
    positions_BT = torch.tensor([[*range(6), *range(9), *range(4)]])
    with torch.no_grad():
        packed_TD = language_model(language_model.embed(tokens_BT), segments_BT, positions_BT)[0]
        for number, sample in enumerate(samples, 1):
            size = len(sample)
            embeddings = language_model.embed(torch.tensor([sample]))
            alone_TD = language_model(embeddings, torch.ones(1, size, dtype=torch.long), torch.arange(size)[None])[0]
            torch.testing.assert_close(packed_TD[segments_BT[0] == number], alone_TD, rtol=1e-5, atol=1e-5)
