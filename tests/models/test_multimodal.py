import json
from typing import Any

import pytest
import torch
from conftest import IMAGE_TOKEN, MEDIA_TOKEN_IDS, NUM_PATCHES
from torch import Tensor

from datamodules.batch import Batch, MediaBatch
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector, PixelShuffleMLPProjector
from encoders.tuning import LoRA, Tune
from models.language import Generation, LanguageModel
from models.media_shuffle import shuffle_media
from models.multimodal import MultiModalModel

FROZEN, FULL = Tune(mode="frozen"), Tune(mode="full")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """For each call of the encoder: pictures in it, and whether it was recorded by autograd."""
    seen: list[tuple[int, bool]] = []
    forward = HFVisionEncoder.forward

    def spy(self: HFVisionEncoder, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        features_BND, mask_BN = forward(self, media, mask)
        seen.append((len(media), features_BND.grad_fn is not None))
        return features_BND, mask_BN

    monkeypatch.setattr(HFVisionEncoder, "forward", spy)
    return seen


def test_each_picture_is_encoded_once(make_model, make_batch, calls):
    model = make_model()
    shared = make_batch([[3, "a", 2], [2, "b", 1, "a", 3], [4, "a", 2]])
    hidden_BTD = model(shared)
    assert sum(number for number, _ in calls) == 2 and not any(recorded for _, recorded in calls)
    copies: Any = shared | {
        "image": shared["image"] | {"media": shared["image"]["media"][[0, 1, 0, 0]], "item_O": torch.arange(4)}
    }
    assert shared["image"]["item_O"].tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(model(copies), hidden_BTD, rtol=1e-5, atol=1e-5)
    assert sum(number for number, _ in calls) >= 2 + 4


def test_what_is_encoded_is_not_encoded_again(make_model, make_batch, calls):
    model, batch = make_model(), make_batch([[3, "a", 2]])
    encoded = model.encode(batch)
    assert torch.equal(model(batch, encoded), model(batch))
    assert len(calls) == 2


@pytest.mark.parametrize(("mode", "recorded"), [("frozen", False), ("lora", True), ("full", True)])
def test_only_an_encoder_that_trains_is_recorded(make_model, make_batch, calls, mode, recorded):
    model = make_model(encoder_tune=Tune(mode=mode), tune=FULL)
    hidden_BTD = model(make_batch([[3, "a", 2]]))
    assert calls == [(1, recorded)]
    hidden_BTD.square().mean().backward()
    for part in model.parts().values():
        for name, parameter in part.named_parameters():
            is_head = name == "model.lm_head.weight"
            assert (parameter.grad is not None) == (parameter.requires_grad and not is_head), name
    assert all(parameter.grad.any() for parameter in model.image_projector.parameters())


def test_nothing_is_recorded_without_autograd(make_model, make_batch, calls):
    model = make_model(encoder_tune=FULL)
    with torch.no_grad():
        assert not model(make_batch([[3, "a", 2]])).requires_grad
    assert calls == [(1, False)]


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_gradients_reach_the_pixels(make_model, make_batch, mode):
    model, batch = make_model(encoder_tune=Tune(mode=mode)), make_batch([[3, "a", 2], [2, "b", 4]])
    pixels = batch["image"]["media"].requires_grad_()
    hidden_BD = model(batch)[:, -1]
    (hidden_BD * torch.linspace(-1, 1, hidden_BD.shape[1])).sum().backward()  # the sum of the squares is the norm's own constant
    assert (pixels.grad.flatten(1).abs().sum(1) > 0.01).all()


def test_text_alone_is_the_language_model(make_model, make_batch, calls):
    model, batch = make_model(), make_batch([[3, 2], [6]])
    expected_BTD = model.language_model(
        model.language_model.embed(batch["tokens_BT"]), batch["segments_BT"], batch["positions_BT"]
    )
    assert torch.equal(model(batch), expected_BTD)
    assert not calls
    without = make_model(images=False)
    without.load_state_dict({name: w for name, w in model.state_dict().items() if name.startswith("language_model.")})
    assert torch.equal(without(batch), expected_BTD)


def test_the_answer_depends_on_the_picture(make_model, make_batch):
    model, batch = make_model(), make_batch([[3, "a", 2], [3, "b", 2]])
    swapped: Any = batch | {"image": batch["image"] | {"item_O": torch.tensor([1, 0])}}
    assert (model(batch)[:, -1] - model(swapped)[:, -1]).abs().amax(1).min() > 1e-2


def test_media_without_an_encoder_are_refused(make_model, make_batch):
    with pytest.raises(
        ValueError, match=r"the batch has image media but the model has no image_encoder: set model.image_encoder"
    ):
        make_model(images=False)(make_batch([[3, "a", 2]]))


def test_placeholders_without_media_are_refused(make_model, make_batch):
    batch = make_batch([[3, 2], [4, 3]])
    batch["tokens_BT"][1, 2:4] = IMAGE_TOKEN
    with pytest.raises(
        ValueError, match="row 1 of the batch has 2 placeholders for image media, but the batch has no image media"
    ):
        make_model()(batch)


def test_a_cut_row_is_refused_with_its_number(make_model, make_batch):
    batch = make_batch([[3, "a", 2], [2, "b", 4]])
    batch["tokens_BT"][1, 2] = 7
    with pytest.raises(
        ValueError, match=f"row 1 of the batch has {NUM_PATCHES - 1} media placeholders, but its media take {NUM_PATCHES}"
    ):
        make_model()(batch)


def test_a_projector_that_miscounts_is_refused_with_the_row(tiny_llm, tiny_clip, make_batch):
    model = MultiModalModel(LanguageModel(str(tiny_llm)), HFVisionEncoder(str(tiny_clip)), PixelShuffleMLPProjector())
    model.build(MEDIA_TOKEN_IDS)
    with pytest.raises(ValueError, match="row 0 of the batch has 16 placeholders for a medium that gives 4 embeddings"):
        model(make_batch([[3, "a", 2]]))


def test_an_encoder_needs_a_projector(tiny_llm, tiny_clip):
    with pytest.raises(ValueError, match="model.image_encoder and model.image_projector go together"):
        MultiModalModel(LanguageModel(str(tiny_llm)), image_encoder=HFVisionEncoder(str(tiny_clip)))


def test_dropout_is_off_while_answering(make_model, make_batch):
    model = make_model(tune=Tune(mode="lora", lora=LoRA(dropout=0.5)))
    batch, options = make_batch([[3, "a", 2], [2]], side="left"), Generation(max_new_tokens=12)
    answers = model.generate(batch, options, eos_ids=[1], pad_id=0)
    model.train()
    assert not torch.equal(model(batch), model(batch))
    assert model.generate(batch, options, eos_ids=[1], pad_id=0) == answers
    assert model.training and model.language_model.training and not model.image_encoder.training


def test_answers_come_without_their_end_token(make_model, make_batch):
    model, batch = make_model(), make_batch([[3, "a", 2], [2]], side="left")
    free = model.generate(batch, Generation(max_new_tokens=6), eos_ids=[1], pad_id=0)
    end = free[0][3]
    assert end not in free[0][:3]
    stopped = model.generate(batch, Generation(max_new_tokens=6), eos_ids=[1, end], pad_id=end)
    assert stopped[0] == free[0][:3]
    assert stopped[1] == (free[1][: free[1].index(end)] if end in free[1] else free[1])


def image_batch(item_O: list[int], row_O: list[int], num_tokens_O: list[int]) -> Batch:
    media = MediaBatch(
        media=torch.arange(3.0),
        mask=None,
        item_O=torch.tensor(item_O),
        row_O=torch.tensor(row_O),
        num_tokens_O=torch.tensor(num_tokens_O),
        position_O=torch.zeros(len(item_O), dtype=torch.long),
    )
    return {"tokens_BT": torch.tensor([[5]]), "image": media}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("item_O", "row_O", "num_tokens_O", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], [4, 4, 4], [1, 2, 0]),
        ([0, 1], [0, 3], [4, 4], [1, 0]),  # rows without pictures between them
        ([0, 1, 2, 3], [0, 1, 2, 3], [4, 9, 4, 9], [2, 3, 0, 1]),  # only among rows with as many tokens
        ([0, 1, 2], [0, 1, 2], [4, 4, 9], [1, 0, 2]),  # the last has no partner
        ([0, 1, 2, 3], [0, 0, 1, 1], [4, 9, 4, 9], [2, 3, 0, 1]),  # two pictures a row
        ([0, 1, 2], [0, 0, 1], [4, 4, 4], None),  # two pictures and one
        ([0, 0, 1, 1], [0, 1, 2, 3], [4, 4, 4, 4], [1, 1, 0, 0]),  # two questions about each picture
        ([0, 1, 0, 2], [0, 1, 2, 3], [4, 4, 4, 4], [1, 2, 1, 0]),
        ([0, 0], [0, 1], [4, 4], None),
        ([0], [2], [4], None),
    ],
)
def test_shuffled_media(item_O, row_O, num_tokens_O, expected):
    batch = image_batch(item_O, row_O, num_tokens_O)
    shuffled = shuffle_media(batch)
    assert (None if shuffled is None else shuffled["image"]["item_O"].tolist()) == expected
    assert batch["image"]["item_O"].tolist() == item_O
    if shuffled is not None:
        assert shuffled["tokens_BT"] is batch["tokens_BT"] and shuffled["image"]["media"] is batch["image"]["media"]
        assert shuffled["image"]["row_O"].tolist() == row_O


def test_text_has_no_media_to_shuffle(make_batch):
    assert shuffle_media(make_batch([[3], [2]])) is None


def test_shuffled_media_are_those_of_the_other_row(make_model, make_batch):
    model, batch = make_model(), make_batch([[3, "a", 2], [2, "b", 3]])
    pixels = batch["image"]["media"]
    exchanged: Any = batch | {"image": batch["image"] | {"media": pixels.flip(0)}}
    torch.testing.assert_close(model(shuffle_media(batch), model.encode(batch)), model(exchanged))


def test_the_spec_makes_the_model_again(tiny_llm, tiny_clip, tiny_siglip):
    lora = Tune(mode="lora", lr=1e-4, lora=LoRA(r=3, target_modules=("q_proj", "o_proj"), use_dora=True))
    model = MultiModalModel(
        LanguageModel(str(tiny_llm), dtype="bfloat16", tune=lora),
        HFVisionEncoder(str(tiny_siglip), layer=-2, tokens="all", tune=FULL),
        MLPProjector(depth=3, norm=True, tune=Tune(lr=1e-3)),
    )
    model.build(MEDIA_TOKEN_IDS)
    spec = json.loads(json.dumps(model.spec()))
    assert spec["media_token_ids"] == MEDIA_TOKEN_IDS
    assert spec["parts"]["language_model"]["class_path"] == "models.language.LanguageModel"
    again = MultiModalModel.from_spec(spec)
    assert not again.is_built and not again.state_dict()
    again.build(spec["media_token_ids"])
    assert again.is_built
    assert MultiModalModel.from_spec(again.spec()).spec() == again.spec() | {"media_token_ids": {}}
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in again.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert again.language_model.tune == lora


def test_the_spec_of_text_alone(tiny_llm):
    spec = MultiModalModel(LanguageModel(str(tiny_llm))).spec()
    assert list(MultiModalModel.from_spec(spec).parts()) == ["language_model", "fusion"]


def test_a_spec_of_another_class_is_refused(tiny_llm, tiny_clip):
    spec = MultiModalModel(LanguageModel(str(tiny_llm))).spec()
    spec["parts"]["language_model"] = HFVisionEncoder(str(tiny_clip)).spec()
    with pytest.raises(ValueError, match=r"HFVisionEncoder cannot be made from its saved options"):
        MultiModalModel.from_spec(spec)
