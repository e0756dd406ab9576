"""Answers behind a shared prompt for ready models: each gives what it gives in a row of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.answer_form import AnswerForm
from datamodules.answer_rows import AnswerExample
from datamodules.batch import Batch
from datamodules.collate import collate
from datamodules.pretrained_processor import PretrainedProcessor
from datamodules.prompt_options import PromptOptions
from lightning_modules.losses import supervised
from models.multimodal import MultiModalModel
from models.pretrained import PretrainedMLLM
from tests.mllm_rows import Row, example_of

ANSWERS = ("A red bus waits at the corner.", "A cat.", "It is a picture of a boat.")


def pair_batch(processor: PretrainedProcessor, family: str, share: bool) -> Batch:
    """A row with a medium and three answers, and one without a medium."""
    medium = ("audio", "1.5") if family == "qwen2_audio" else ("image", "60x80")
    rows = []
    for content in ([medium, "What is this? Tell me in a few words."], ["How many birds are there in the tree?"]):
        sides = []
        for answer in ANSWERS:
            row: Row = [("user", content), ("assistant", [answer])]  # type: ignore[list-item]
            sides.append(example_of(row, processor))
        others = [("rejected", side) for side in sides[1:]]
        rows.append(AnswerExample(**vars(sides[0]), others=others, form=AnswerForm("pairs", shared_prompt=share)))
    return collate(rows, processor.pad_id)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "qwen2_audio"])
def test_shared_rows_give_what_separate_rows_give(family: str, model_folder: Callable[[str], Path]) -> None:
    language_model = PretrainedMLLM(name_or_path=str(model_folder(family)))
    processor = PretrainedProcessor(str(model_folder(family)), PromptOptions(), language_model)
    model = MultiModalModel(language_model)
    model.build(processor.chat.media_ids)
    model.eval()
    shared, apart = pair_batch(processor, family, True), pair_batch(processor, family, False)
    assert (len(shared["tokens_BT"]), len(apart["tokens_BT"])) == (2, 6)
    assert shared["answers"]["keys"] == apart["answers"]["keys"] and language_model.takes_branches == (family != "gemma3")
    losses = []
    for batch in (shared, apart):
        model.zero_grad()
        hidden_SD, labels_S = supervised(model(batch), batch["labels_BT"])
        weight_D = torch.linspace(-1, 1, hidden_SD.shape[1])
        (hidden_SD @ weight_D).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        losses.append((hidden_SD.detach(), labels_S, gradients))
    (hidden_SD, labels_S, gradients), (expected_SD, expected_S, expected) = losses
    assert labels_S.tolist() == expected_S.tolist()
    torch.testing.assert_close(hidden_SD, expected_SD, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()) + 1e-6)
