"""Ready models against Hugging Face's own processor and model on the same rows: the same ids, media, logits and loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.batch import IGNORE_INDEX, MODALITIES, Batch
from datamodules.collate import collate
from datamodules.prompt_options import PromptOptions
from lightning_modules.losses import cross_entropy, supervised
from lightning_modules.processors import make_processor
from models.language import Generation
from models.multimodal import MultiModalModel
from models.pretrained import PretrainedMLLM, media_inputs
from tests.mllm_rows import example_of, hugging_face_batch, rows_of
from tests.tiny_mllm import FAMILIES

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Pair:
    """One folder as our model and processor, and as those of transformers."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from transformers import AutoModelForMultimodalLM, AutoProcessor

        self.model = MultiModalModel(PretrainedMLLM(name_or_path=str(folder), **options))
        self.processor = make_processor(self.model, PromptOptions(max_length=4096))
        self.model.build(self.processor.chat.media_ids)
        self.model.eval()
        self.hf_processor = AutoProcessor.from_pretrained(folder)
        self.hf_model = AutoModelForMultimodalLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    def batch(self, rows: Any, generate: bool = False) -> Batch:
        """The rows as a batch of ours."""
        examples = [example_of(row, self.processor, number, generate) for number, row in enumerate(rows)]
        return collate(examples, self.processor.pad_id, "left" if generate else "right")


@pytest.fixture(scope="module")
def pair(model_folder: Callable[[str], Path]) -> Callable[[str], Pair]:
    """`pair(family)`, made once."""
    pairs: dict[str, Pair] = {}
    return lambda family: pairs.setdefault(family, Pair(model_folder(family)))


def ours(batch: Batch) -> dict[str, torch.Tensor]:
    """The arguments that the model reads of a batch."""
    inputs = {"input_ids": batch["tokens_BT"], "attention_mask": batch["segments_BT"]}
    for modality in MODALITIES:
        if modality in batch:
            inputs |= media_inputs(batch[modality], batch["segments_BT"])
    return inputs


def learnt_by_hand(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Labels of ChatML: what stands behind each `<|im_start|>assistant` and its line break, with the `<|im_end|>`."""
    header = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, numbers in enumerate(ids.tolist()):
        for place in range(len(numbers)):
            if numbers[place - len(header) : place] == header:
                stop = numbers.index(end, place) + 1
                labels[row, place:stop] = ids[row, place:stop]
    return labels


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_media_are_those_of_the_models_own_processor(family: str, pair: Callable[[str], Pair]) -> None:
    both = pair(family)
    batch = both.batch(rows_of(family))
    expected = hugging_face_batch(rows_of(family), both.hf_processor)
    types = expected.pop("mm_token_type_ids", expected.pop("token_type_ids", None))
    assert types is None or torch.equal(batch["token_types_BT"], types)
    found = ours(batch)
    if "batch_num_images" in expected:  # of a row without images transformers says 0, and reads nothing
        expected["batch_num_images"] = expected["batch_num_images"][expected["batch_num_images"] > 0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        torch.testing.assert_close(
            found[name], value.to(found[name].dtype), **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(batch["labels_BT"], learnt_by_hand(batch["tokens_BT"], both.hf_processor.tokenizer))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_are_those_of_the_model(family: str, pair: Callable[[str], Pair]) -> None:
    both = pair(family)
    batch = both.batch(rows_of(family))
    language_model = both.model.language_model
    with torch.no_grad():
        expected = both.hf_model(**hugging_face_batch(rows_of(family), both.hf_processor), labels=batch["labels_BT"])
        hidden_BTD = both.model(batch)
        real_BT = batch["segments_BT"] > 0
        torch.testing.assert_close(language_model.head(hidden_BTD)[real_BT], expected.logits[real_BT], **CLOSE)
        total, count, _ = cross_entropy(*_of_loss(hidden_BTD, batch, language_model))
    torch.testing.assert_close(total / count, expected.loss, **CLOSE)
    for row, single in enumerate(rows_of(family)):  # a row alone, without padding
        alone = both.batch([single])
        size = alone["tokens_BT"].shape[1]
        torch.testing.assert_close(both.model(alone)[0], hidden_BTD[row, :size], rtol=1e-4, atol=1e-4)


def _of_loss(hidden_BTD: torch.Tensor, batch: Batch, language_model: PretrainedMLLM) -> tuple[Any, ...]:
    hidden_SD, labels_S = supervised(hidden_BTD, batch["labels_BT"])
    return hidden_SD, language_model.head, labels_S


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_models_own_generate(family: str, pair: Callable[[str], Pair]) -> None:
    both = pair(family)
    batch = both.batch(rows_of(family), generate=True)
    inputs = hugging_face_batch(rows_of(family), both.hf_processor, side="left", generate=True)
    assert torch.equal(batch["tokens_BT"], inputs["input_ids"])
    answers = both.model.generate(batch, Generation(max_new_tokens=8), [638], pad_id=0)
    both.hf_model.generation_config.eos_token_id = 638
    expected = both.hf_model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert answers == [row.tolist() for row in expected[:, inputs["input_ids"].shape[1] :]]
    torch.testing.assert_close(both.model(batch), both.model(batch))  # nothing of the answer stays behind


def test_a_repetition_penalty_is_on_the_answer_and_not_on_the_prompt(pair: Callable[[str], Pair]) -> None:
    both = pair("qwen2_5_vl")
    batch = both.batch(rows_of("qwen2_5_vl"), generate=True)
    plain = both.model.generate(batch, Generation(max_new_tokens=24), [638], pad_id=0)
    answers = both.model.generate(batch, Generation(max_new_tokens=24, repetition_penalty=1e6), [638], pad_id=0)
    assert [answer[0] for answer in answers] == [answer[0] for answer in plain]
    assert all(len(set(answer)) == len(answer) for answer in answers)
    assert any(len(set(answer)) < len(answer) for answer in plain)
