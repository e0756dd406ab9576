"""Gated cross-attention against the text model, and against the formula token by token.

Shape suffixes: B rows, T tokens, D hidden size, V vocabulary, O occurrences, M embeddings of an item, P embeddings that a token
sees, H heads, E width of a head.
"""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import MEDIA_TOKEN_IDS, NUM_PATCHES
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.batch import Batch
from encoders.image import HFVisionEncoder
from encoders.resampler import PerceiverResampler
from encoders.tuning import LoRA, Tune
from models.checkpoint import fingerprints, load_saved, saved_names
from models.cross_attention import AttendTo, GatedCrossAttentionFusion, gather
from models.fusion import ConcatFusion, Fusion, PlacedMedia
from models.language import Generation, LanguageModel
from models.media_shuffle import shuffle_media
from models.multimodal import MultiModalModel

FROZEN, FULL = Tune(mode="frozen"), Tune(mode="full")
LAYOUTS = [[3, "a", 4, "b", 3], [5], ["b", 6], [2, "a", "c", 5]]
"""Two pictures apart, none, one at the start, and two side by side."""

Make = Callable[..., Any]


def crossing(**options: Any) -> GatedCrossAttentionFusion:
    return GatedCrossAttentionFusion(**({"every": 1, "num_heads": 2, "head_dim": 4} | options))


def open_gates(model: MultiModalModel, strength: float = 1.0) -> MultiModalModel:
    """Gates at random; what is read of the media is made so many times stronger."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.fusion.named_parameters():
        if name.endswith("_gate"):
            parameter.data = torch.rand(1, generator=generator) + 0.5
        elif name.endswith("attention.o_proj.weight"):
            parameter.data *= strength
    return model


def loss_of(model: MultiModalModel, batch: Batch) -> Tensor:
    """How much the hidden states point in random directions (the final norm fixes their lengths)."""
    hidden_BTD = model(batch)
    return (hidden_BTD * torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(1))).sum()


def text_of(batch: Batch) -> Batch:
    """The same rows without their media; they take no tokens."""
    return {name: value for name, value in batch.items() if name != "image"}  # type: ignore[return-value]


@pytest.fixture
def model(make_model: Make) -> MultiModalModel:
    return make_model(fusion=crossing())


@pytest.fixture
def batch(make_batch: Make) -> Batch:
    return make_batch(LAYOUTS, placeholders=0)


# the text model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj", "cohere", "granite"])
def test_it_starts_as_the_text_model(make_model: Make, model_folder: Make, batch: Batch, family: str) -> None:
    model = make_model(model_folder(family), fusion=crossing(), tune=FROZEN)
    text_BTD = make_model(model_folder(family), tune=FROZEN)(text_of(batch))
    assert torch.equal(model(batch), text_BTD)
    assert not torch.equal(open_gates(model)(batch), text_BTD)


def test_it_starts_as_the_adapted_text_model_in_bfloat16_too(tiny_llm: Any, make_model: Make, batch: Batch) -> None:
    model = make_model(fusion=crossing(), tune=Tune(mode="lora", lora=LoRA(target_modules=("q_proj", "o_proj"))))
    model.language_model.model.to(torch.bfloat16)
    hidden_BTD = model(batch)
    assert hidden_BTD.dtype == torch.bfloat16
    assert torch.equal(hidden_BTD, model(text_of(batch)))
    assert not torch.equal(open_gates(model)(batch), hidden_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(batch)).all()


def test_tokens_without_media_before_them_stay_as_they_are(model: MultiModalModel, batch: Batch) -> None:
    hidden_BTD, text_BTD = open_gates(model)(batch), model(text_of(batch))
    differs_BT = (hidden_BTD != text_BTD).any(-1)
    first = [3, 99, 0, 2]  # the first token after a picture
    for row, start in enumerate(first):
        length = int(batch["segments_BT"][row].sum())
        assert differs_BT[row, :length].tolist() == [place >= start for place in range(length)]


def test_nothing_stays_behind(model: MultiModalModel, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    open_gates(model)
    layers = model.language_model.decoder_layers
    text_BTD, hidden_BTD = model(text_of(batch)), model(batch)
    assert torch.equal(model(text_of(batch)), text_BTD)
    with monkeypatch.context() as patch:
        patch.setattr(layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(batch)
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert torch.equal(model(text_of(batch)), text_BTD) and torch.equal(model(batch), hidden_BTD)
    with model.fused(batch, model.encode(batch)), pytest.raises(RuntimeError, match="in the middle of a batch"):
        model(batch)
    assert not any(layer._forward_pre_hooks for layer in layers) and torch.equal(model(batch), hidden_BTD)


# the formula


class Reference(nn.Module):
    """A decoder layer behind a block that is computed token by token, from a list of what each token sees."""

    def __init__(self, layer: nn.Module, block: nn.Module, seen: list[list[Tensor | None]]) -> None:
        super().__init__()
        self.layer, self.weights, self.seen = layer, block.state_dict(), seen

    def forward(self, hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Any:
        for row, tokens in enumerate(self.seen):
            for token, seen_PD in enumerate(tokens):
                if seen_PD is not None:
                    hidden_BTD[row, token] = self.block(hidden_BTD[row, token], seen_PD)
        return self.layer(hidden_BTD, *args, **kwargs)

    def block(self, hidden_D: Tensor, seen_PD: Tensor) -> Tensor:
        queries_HE = (self.norm(hidden_D, "attention.norm") @ self.weight("attention.q_proj").T).unflatten(0, (2, 4))
        memory_PD = self.norm(seen_PD, "attention.memory_norm")
        keys_PHE, values_PHE = ((memory_PD @ self.weight(f"attention.{x}_proj").T).unflatten(1, (2, 4)) for x in "kv")
        weights_PH = (torch.einsum("he,phe->ph", queries_HE, keys_PHE) / 2).softmax(0)
        read_D = torch.einsum("ph,phe->he", weights_PH, values_PHE).flatten() @ self.weight("attention.o_proj").T
        hidden_D = hidden_D + self.weights["attention_gate"].tanh() * read_D
        dense_D = self.norm(hidden_D, "feed_forward.norm") @ self.weight("feed_forward.up_proj").T
        dense_D = dense_D.clamp(min=0).square() @ self.weight("feed_forward.down_proj").T
        return hidden_D + self.weights["feed_forward_gate"].tanh() * dense_D

    def weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])


SEEN: dict[str, list[list[str]]] = {
    "all": [["", "", "", "a", "a", "a", "a", "ab", "ab", "ab"], [""] * 5, ["b"] * 6, ["", "", "ac", "ac", "ac", "ac", "ac"]],
    "last": [["", "", "", "a", "a", "a", "a", "b", "b", "b"], [""] * 5, ["b"] * 6, ["", "", "ac", "ac", "ac", "ac", "ac"]],
}
"""The pictures that each token of `LAYOUTS` sees."""


@torch.no_grad()
def by_formula(model: MultiModalModel, batch: Batch, seen: list[list[str]]) -> Tensor:
    embeddings_NMD, _ = model.encode(batch)["image"]
    pictures = dict(zip("abc", embeddings_NMD, strict=True))
    tensors = [[torch.cat([pictures[name] for name in names]) if names else None for names in row] for row in seen]
    reference = copy.deepcopy(model.language_model)
    layers = reference.decoder_layers
    for number, block in model.fusion.blocks.items():
        layers[int(number)] = Reference(layers[int(number)], block, tensors)
    return reference(reference.embed(batch["tokens_BT"]), batch["segments_BT"], batch["positions_BT"])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("attend_to", ["all", "last"])
def test_it_is_the_formula(make_model: Make, batch: Batch, attend_to: AttendTo, every: int) -> None:
    model = open_gates(make_model(fusion=crossing(attend_to=attend_to, every=every)))
    assert list(model.fusion.blocks) == (["0", "1"] if every == 1 else ["1"])
    assert batch["image"]["item_O"].tolist() == [0, 1, 1, 0, 2]
    expected_BTD = by_formula(model, batch, SEEN[attend_to])
    real_BT = batch["segments_BT"] > 0
    torch.testing.assert_close(model(batch)[real_BT], expected_BTD[real_BT], rtol=1e-4, atol=1e-4)
    if every == 1:
        other_BTD = by_formula(model, batch, SEEN["last" if attend_to == "all" else "all"])
        assert (model(batch) - other_BTD)[0, 7:].abs().amax(1).min() > 1e-2


def test_a_row_in_a_batch_is_the_row_alone(model: MultiModalModel, batch: Batch, make_batch: Make) -> None:
    hidden_BTD = open_gates(model)(batch)
    left_BTD = model(make_batch(LAYOUTS, side="left", placeholders=0))
    for row, real_T in enumerate(batch["segments_BT"] > 0):
        length = int(real_T.sum())
        torch.testing.assert_close(left_BTD[row, -length:], hidden_BTD[row, :length], rtol=1e-4, atol=1e-4)


def test_media_of_items_with_another_number_of_embeddings(model: MultiModalModel, batch: Batch) -> None:
    """Padded embeddings are not seen: cut to their own length, each item alone gives the same."""
    encoded = model.encode(batch)
    embeddings_NMD, _ = encoded["image"]
    mask_NM = torch.arange(NUM_PATCHES) < torch.tensor([[16], [5], [9]])
    noise_NMD = torch.where(mask_NM[..., None], embeddings_NMD, torch.randn(embeddings_NMD.shape, generator=torch.Generator()))
    padded_BTD = open_gates(model)(batch, {"image": (noise_NMD, mask_NM)})
    assert torch.equal(padded_BTD, model(batch, {"image": (embeddings_NMD, mask_NM)}))
    expected_BTD = model(batch, {"image": (embeddings_NMD[:, :5], None)})
    torch.testing.assert_close(padded_BTD[2], expected_BTD[2], rtol=1e-4, atol=1e-4)  # it has the second alone
    assert (padded_BTD - expected_BTD)[0, 3:].abs().amax(1).min() > 1e-3


def test_media_of_all_modalities_come_together() -> None:
    generator = torch.Generator().manual_seed(2)
    images_OMD, sounds_OMD = torch.randn(3, 2, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    nothing_BT = torch.zeros(3, 6, dtype=torch.bool)
    zeros = torch.zeros(3, dtype=torch.long)
    images = PlacedMedia(images_OMD, None, torch.tensor([0, 0, 2]), torch.tensor([1, 4, 5]), zeros, nothing_BT)
    mask_OM = torch.tensor([[True, True, False], [False, False, True]])
    sounds = PlacedMedia(sounds_OMD, mask_OM, torch.tensor([0, 2]), torch.tensor([2, 6]), zeros[:2], nothing_BT)
    segments_BT = torch.tensor([[1, 1, 1, 2, 2, 2], [1] * 6, [0, 1, 1, 1, 2, 2]])
    memory = gather([images, sounds], segments_BT, "all")
    assert memory.embeddings_BKD.shape == (3, 6, 4)
    assert torch.equal(memory.embeddings_BKD[0], torch.cat([images_OMD[0], images_OMD[1], sounds_OMD[0, :2]]))
    assert not memory.embeddings_BKD[1].any() and not memory.embeddings_BKD[2, 3:].any()
    assert torch.equal(memory.embeddings_BKD[2, :3], torch.cat([images_OMD[2], sounds_OMD[1, 2:]]))

    # row 0: an image of sample 1 before token 1, a sound of it before token 2, an image of sample 2 before token 4
    all_TK = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1], [0] * 6, *[[0, 0, 1, 1, 0, 0]] * 2])
    assert memory.seen_by(6)[0].tolist() == all_TK.bool().tolist()
    assert not memory.seen_by(6)[1].any()
    # row 2: an image before the last token, a sound behind it, which only what is generated sees
    assert memory.seen_by(6)[2].int().tolist() == [[0] * 6] * 5 + [[1, 1, 0, 0, 0, 0]]
    assert torch.equal(memory.seen_by(8)[:, :6], memory.seen_by(6))
    assert torch.equal(memory.seen_by(8)[:, 7:], memory.seen_by(1))
    assert memory.seen_by(1)[:, 0].int().tolist() == [[0, 0, 1, 1, 0, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]
    last = gather([images, sounds], segments_BT, "last")
    assert last.seen_by(6)[0].int().tolist() == [[0] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], *all_TK[3:].tolist()]
    assert last.seen_by(1)[2, 0].int().tolist() == [0, 0, 1, 0, 0, 0]
    with pytest.raises(AssertionError, match="3 of 6 tokens"):
        memory.seen_by(3)


# generation


@torch.no_grad()
def greedy(model: MultiModalModel, batch: Batch, num_new: int) -> list[int]:
    """The answer to one row without a cache: the whole row anew for each token."""
    answer: list[int] = []
    tokens_BT = batch["tokens_BT"]
    for _ in range(num_new):
        length = tokens_BT.shape[1]
        grown: Any = batch | {
            "tokens_BT": tokens_BT,
            "segments_BT": torch.ones(1, length, dtype=torch.long),
            "positions_BT": torch.arange(length)[None],
        }
        answer.append(int(model.language_model.head(model(grown)[:, -1]).argmax()))
        tokens_BT = torch.cat([tokens_BT, torch.tensor([answer[-1:]])], dim=1)
    return answer


@pytest.mark.parametrize("attend_to", ["all", "last"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_generation(make_model: Make, model_folder: Make, make_batch: Make, family: str, attend_to: AttendTo) -> None:
    """With a cache and left padding each row gives the tokens that it gives alone and without a cache."""
    model = open_gates(make_model(model_folder(family), tune=FROZEN, fusion=crossing(attend_to=attend_to)), strength=30)
    layouts = [[3, "a", 2, "b", 3], [4], ["b", 6], [2, "a"]]  # in the last one only the answer sees the picture
    prompts, options = make_batch(layouts, side="left", placeholders=0), Generation(max_new_tokens=5)
    answers = model.generate(prompts, options, eos_ids=[601], pad_id=0)
    text = model.generate(text_of(prompts), options, eos_ids=[601], pad_id=0)
    assert [answer != other for answer, other in zip(answers, text, strict=True)] == [True, False, True, True]
    for row, answer in enumerate(answers):
        own_O = prompts["image"]["row_O"] == row
        length = int(prompts["segments_BT"][row].sum())
        padding = prompts["tokens_BT"].shape[1] - length
        tokens_BT, own = prompts["tokens_BT"][row : row + 1, padding:], prompts["examples"][row : row + 1]
        alone: Any = {"tokens_BT": tokens_BT, "examples": own}
        if own_O.any():
            image = prompts["image"]
            alone["image"] = image | {
                "item_O": image["item_O"][own_O],
                "row_O": torch.zeros_like(image["row_O"][own_O]),
                "num_tokens_O": image["num_tokens_O"][own_O],
                "position_O": image["position_O"][own_O] - padding,
            }
        assert greedy(model, alone, 5) == answer


# training


@pytest.fixture
def shut(make_model: Make, batch: Batch) -> Iterator[MultiModalModel]:
    """A model all of whose parts are trained, after the first backward pass."""
    model = make_model(fusion=crossing(), tune=FULL, encoder_tune=FULL)
    loss_of(model, batch).backward()
    return model


def test_at_first_only_the_gates_learn(shut: MultiModalModel, batch: Batch) -> None:
    assert shut.fusion.is_shut
    for name, parameter in shut.fusion.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any() == name.endswith("_gate"), name
    for part in (shut.image_projector, shut.image_encoder):  # they have a gradient, and it is 0
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in part.parameters())
    torch.optim.SGD(shut.parameters(), lr=1e-2).step()
    shut.zero_grad()
    assert not shut.fusion.is_shut
    loss_of(shut, batch).backward()
    for part in (shut.fusion, shut.image_projector):
        assert all(parameter.grad.any() for parameter in part.parameters())
    assert any(parameter.grad.any() for parameter in shut.image_encoder.parameters())


def test_an_open_feed_forward_gate_lets_no_picture_through(model: MultiModalModel, batch: Batch) -> None:
    model.fusion.blocks["0"].feed_forward_gate.data.fill_(1)
    assert model.fusion.is_shut
    pixels = batch["image"]["media"].requires_grad_()
    loss_of(model, batch).backward()
    assert not pixels.grad.any()


def test_activation_checkpointing_gives_the_same_gradients(make_model: Make, batch: Batch) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = open_gates(make_model(fusion=crossing())).train()
        if checkpointing:
            model.language_model.model.activation_checkpointing_enable()
        loss_of(model, batch).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4)


def test_shuffled_media_are_those_of_the_other_row(model: MultiModalModel, make_batch: Make) -> None:
    """Among rows with equally many media; they stand where the row's own stood."""
    layouts = [[3, "a", 4], ["b", 6], [2, "a", 1, "c", 5], [4], ["c", "b", 2]]
    batch = make_batch(layouts, placeholders=0)
    shuffled = shuffle_media(batch)
    assert shuffled is not None
    assert batch["image"]["item_O"].tolist() == [0, 1, 0, 2, 2, 1]
    assert shuffled["image"]["item_O"].tolist() == [1, 0, 2, 1, 0, 2]
    assert shuffled["image"]["position_O"].tolist() == [3, 0, 2, 3, 0, 0]
    exchanged = make_batch([[3, "b", 4], ["a", 6], [2, "c", 1, "b", 5], [4], ["a", "c", 2]], placeholders=0)
    torch.testing.assert_close(open_gates(model)(shuffled), model(exchanged))


# what it is made of


def test_the_spec_and_the_checkpoint(model: MultiModalModel, tiny_llm: Any, tiny_clip: Any, batch: Batch) -> None:
    hidden_BTD = open_gates(model)(batch)
    spec = json.loads(json.dumps(model.spec()))
    assert spec["parts"]["fusion"]["init_args"]["every"] == 1
    again = MultiModalModel.from_spec(spec)
    assert isinstance(again.fusion, GatedCrossAttentionFusion) and again.fusion.options == model.fusion.options
    again.build(MEDIA_TOKEN_IDS)
    names = saved_names(model)
    assert {name for name in names if name.startswith("fusion.")} == {f"fusion.{name}" for name in model.fusion.state_dict()}
    state = model.state_dict()
    load_saved(again, {name: state[name] for name in names}, fingerprints(model, names))
    assert torch.equal(again.eval()(batch), hidden_BTD)


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_it_is_saved_frozen_or_not(make_model: Make, mode: Any) -> None:
    model = make_model(fusion=crossing(tune=Tune(mode=mode)))
    assert {f"fusion.{name}" for name in model.fusion.state_dict()} <= saved_names(model)
    assert all(parameter.requires_grad == (mode == "full") for parameter in model.fusion.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.fusion.parameters())


def test_a_resampler_feeds_it(tiny_llm: Any, tiny_clip: Any, batch: Batch) -> None:
    resampler = PerceiverResampler(num_latents=3, depth=1, num_heads=2, head_dim=4)
    model = MultiModalModel(LanguageModel(str(tiny_llm)), HFVisionEncoder(str(tiny_clip)), resampler, fusion=crossing())
    model.build(MEDIA_TOKEN_IDS)
    text_BTD = model(text_of(batch))
    assert torch.equal(model(batch), text_BTD)
    assert not torch.equal(open_gates(model)(batch), text_BTD)


def test_concatenation_is_the_default(make_model: Make) -> None:
    model = make_model()
    assert isinstance(model.fusion, ConcatFusion) and not list(model.fusion.parameters()) and not model.fusion.is_shut
    assert model.fusion.num_placeholders(7) == 7 and crossing().num_placeholders(7) == 0
    assert isinstance(Fusion.from_spec(model.fusion.spec()), ConcatFusion)


def test_rows_made_for_concatenation_are_refused(model: MultiModalModel, make_batch: Make) -> None:
    with pytest.raises(ValueError, match=f"row 1 of the batch has {NUM_PATCHES} media placeholders, but GatedCrossAttention"):
        model(make_batch([[3], [2, "a", 2]]))


def test_rows_made_for_cross_attention_are_refused_by_concatenation(make_model: Make, batch: Batch) -> None:
    with pytest.raises(ValueError, match="row 0 of the batch has 0 placeholders for a medium that gives 16 embeddings"):
        make_model()(batch)


def test_options_that_cannot_be(tiny_llm: Any) -> None:
    for option in ("every", "num_heads", "head_dim"):
        with pytest.raises(ValueError, match=f"{option} of GatedCrossAttentionFusion must be at least 1, got 0"):
            GatedCrossAttentionFusion(**{option: 0})
    model = MultiModalModel(LanguageModel(str(tiny_llm)), fusion=GatedCrossAttentionFusion(every=3))
    with pytest.raises(ValueError, match=r"fusion.every is 3, but the language model has 2 layers.* set it to 2 or less"):
        model.build(MEDIA_TOKEN_IDS)


def test_a_decoder_whose_layers_are_not_known_is_refused(tiny_llm: Any) -> None:
    language_model = LanguageModel(str(tiny_llm))
    language_model.build()
    language_model.model.base_model.others = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="has 2 lists of 2 modules, expected one.* override `decoder_layers`"):
        _ = language_model.decoder_layers
