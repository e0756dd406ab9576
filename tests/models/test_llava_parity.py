"""A composed model with the weights of a LLaVA of transformers computes what that computes: logits, loss, gradients, answers.

Rows: a picture in text; two pictures, one of them that of the first row; text alone, padded.

Shape suffixes: B rows, T positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import IMAGE_TOKEN, MEDIA_TOKEN_IDS, randomise_adapters
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from datamodules.batch import Batch
from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.losses import cross_entropy, supervised
from models.language import Generation, LanguageModel
from models.multimodal import MultiModalModel
from tests.tiny_configs import LLAMA, VISION

LAYOUTS = [[5, "a", 7, 4], [2, "a", 3, "b", 2, 6], [6, 3]]
PROMPTS = [[5, "a", 7], [2, "a", 3, "b", 2], [6]]
FULL = Tune(mode="full")


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    """LLaVA-1.5 in small; it needs a row of the embedding table for its placeholder, which ours does not."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**LLAMA | {"vocab_size": IMAGE_TOKEN + 1}),
        image_token_id=IMAGE_TOKEN,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():  # the projector's and the vision tower's start too small, biases at 0
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folders(llava: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """LLaVA's language model and its vision tower as folders of their own."""
    language, vision = tmp_path_factory.mktemp("llava_language"), tmp_path_factory.mktemp("llava_vision")
    causal = LlamaForCausalLM(llava.config.text_config)
    causal.model.load_state_dict(llava.model.language_model.state_dict())
    causal.lm_head.load_state_dict(llava.lm_head.state_dict())
    causal.save_pretrained(language)
    llava.model.vision_tower.save_pretrained(vision)
    return language, vision


@pytest.fixture
def compose(llava: LlavaForConditionalGeneration, folders: tuple[Path, Path]) -> Callable[..., MultiModalModel]:
    def make(tune: Tune = FULL) -> MultiModalModel:
        model = MultiModalModel(
            LanguageModel(str(folders[0]), tune=tune),
            HFVisionEncoder(str(folders[1]), layer=-2, tune=FULL),
            MLPProjector(),
        )
        model.build(MEDIA_TOKEN_IDS)
        model.image_projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
        return model.eval()

    return make


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The same batch as LLaVA takes it: a picture for each place."""
    media = batch["image"]
    return {
        "input_ids": batch["tokens_BT"],
        "attention_mask": (batch["segments_BT"] > 0).long(),
        "pixel_values": media["media"][media["item_O"]],
    }


def name_in_llava(name: str) -> str:
    for ours, theirs in {
        "language_model.model.model.": "model.language_model.",
        "language_model.model.lm_head.": "lm_head.",
        "image_encoder.model.": "model.vision_tower.",
        "image_projector.": "model.multi_modal_projector.",
    }.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"{name} belongs to no part")


def mean_loss(model: MultiModalModel, batch: Batch) -> Tensor:
    hidden_SD, labels_S = supervised(model(batch), batch["labels_BT"])
    total, count, _ = cross_entropy(hidden_SD, model.language_model.head, labels_S, chunk_size=5)
    return total / count


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> int:
    """Compares every gradient; returns their number."""
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None and p.grad.any()}
    got = {name_in_llava(name): p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.endswith("embed_tokens.weight"):
            gradient = gradient[: len(got[name])]
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * max(1.0, scale), msg=lambda m, n=name: f"{n}: {m}")
    return len(expected)


def test_logits_are_those_of_llava(llava, compose, make_batch):
    batch, model = make_batch(LAYOUTS), compose()
    with torch.no_grad():
        logits_BTV = model.language_model.head(model(batch))
        expected_BTV = llava(**inputs_of(batch)).logits
    is_token_BT = batch["segments_BT"] > 0
    assert not is_token_BT.all()
    torch.testing.assert_close(logits_BTV[is_token_BT], expected_BTV[is_token_BT], rtol=1e-5, atol=1e-5)


def test_loss_and_all_gradients_are_those_of_llava(llava, compose, make_batch):
    batch, model = make_batch(LAYOUTS), compose()
    llava.zero_grad()
    expected = llava(**inputs_of(batch), labels=batch["labels_BT"]).loss
    expected.backward()
    loss = mean_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert assert_same_gradients(model, llava) > 60


def test_gradients_reach_the_pixels(llava, compose, make_batch):
    batch, model = make_batch([[5, "a", 7, 4], [2, "b", 3, "c", 2, 6]]), compose()
    pixels = batch["image"]["media"]
    theirs = pixels.clone().requires_grad_()
    llava(**inputs_of(batch) | {"pixel_values": theirs}, labels=batch["labels_BT"]).loss.backward()
    pixels.requires_grad_()
    mean_loss(model, batch).backward()
    assert pixels.grad.flatten(1).abs().sum(1).min() > 0
    torch.testing.assert_close(pixels.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_lora_is_that_of_peft(llava, compose, make_batch, options):
    from peft import LoraConfig, get_peft_model

    batch = make_batch(LAYOUTS)
    model = compose(Tune(mode="lora", lora=LoRA(r=4, alpha=6.0, **options)))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        randomise_adapters(model)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=r".*language_model.*\.(q_proj|v_proj)", **options)
    peft_model = get_peft_model(copy_of(llava), config)
    reference = peft_model.base_model.model
    adapters = {name_in_llava(name): p for name, p in model.named_parameters() if "lora_" in name}
    own = dict(reference.named_parameters())
    with torch.no_grad():
        for name, adapter in adapters.items():
            own[name].copy_(adapter)
    for name, parameter in own.items():
        parameter.requires_grad_(parameter.requires_grad or "vision_tower" in name or "multi_modal_projector" in name)
    expected = peft_model(**inputs_of(batch), labels=batch["labels_BT"]).loss
    expected.backward()
    loss = mean_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert (model(batch) - compose()(batch)).abs().max() > 0.1  # the adapters count
    assert assert_same_gradients(model, reference) > 40


def copy_of(llava: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    copy = LlavaForConditionalGeneration(llava.config)
    copy.load_state_dict(llava.state_dict())
    return copy.eval()


def answers_of_llava(llava: LlavaForConditionalGeneration, batch: Batch, **options: Any) -> list[list[int]]:
    config = GenerationConfig(pad_token_id=0, eos_token_id=1, **options)
    tokens_BT = llava.generate(**inputs_of(batch), generation_config=config)
    answers = tokens_BT[:, batch["tokens_BT"].shape[1] :].tolist()
    return [answer[: answer.index(1)] if 1 in answer else answer for answer in answers]


def test_greedy_answers_are_those_of_llava(llava, compose, make_batch):
    batch = make_batch(PROMPTS, side="left")
    answers = compose().generate(batch, Generation(max_new_tokens=12), eos_ids=[1], pad_id=0)
    expected = answers_of_llava(llava, batch, max_new_tokens=12, do_sample=False)
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) == 3


def test_sampled_answers_are_those_of_llava(llava, compose, make_batch):
    batch, model = make_batch(PROMPTS, side="left"), compose()
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 40}
    with torch.random.fork_rng():
        torch.manual_seed(8)
        answers = model.generate(batch, Generation(max_new_tokens=12, **sampling), eos_ids=[1], pad_id=0)
        torch.manual_seed(8)
        expected = answers_of_llava(llava, batch, max_new_tokens=12, do_sample=True, **sampling)
    assert answers == expected
    assert answers != answers_of_llava(llava, batch, max_new_tokens=12, do_sample=False)


def test_a_batch_answers_as_each_row_alone(compose, make_batch):
    model, together = compose(), make_batch(PROMPTS, side="left")
    answers = model.generate(together, Generation(max_new_tokens=12), eos_ids=[1], pad_id=0)
    hidden_BTD = model(together)
    for row, layout in enumerate(PROMPTS):
        alone = row_of(together, row, layout)
        assert model.generate(alone, Generation(max_new_tokens=12), eos_ids=[1], pad_id=0) == [answers[row]]
        length = alone["tokens_BT"].shape[1]
        torch.testing.assert_close(hidden_BTD[row, -length:], model(alone)[0], rtol=1e-4, atol=1e-4)


def row_of(batch: Batch, row: int, layout: list[int | str]) -> Batch:
    """One row of a left-padded batch, without its padding."""
    length = int((batch["segments_BT"][row] > 0).sum())
    alone = dict(batch)
    for name in ("tokens_BT", "labels_BT", "positions_BT", "segments_BT"):
        alone[name] = batch[name][row : row + 1, -length:]
    occurrences_O = batch["image"]["row_O"] == row
    if any(isinstance(piece, str) for piece in layout):
        own = {name: batch["image"][name][occurrences_O] for name in ("item_O", "num_tokens_O")}
        alone["image"] = batch["image"] | own | {"row_O": torch.zeros(int(occurrences_O.sum()), dtype=torch.long)}
    else:
        del alone["image"]
    return alone
