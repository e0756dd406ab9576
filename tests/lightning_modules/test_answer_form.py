"""An objective that compares answers gets them from any data module, through the command line and the callbacks of every run."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.answer_form import AnswerForm
from datamodules.batch import Batch, answers_of_positions
from lightning_modules.answer_metrics import answer_values
from lightning_modules.first_step import problem_of_labels
from lightning_modules.losses import cross_entropy, supervised
from lightning_modules.measuring import Stage
from lightning_modules.multimodal import MultiModalLitModule
from tests.lightning_modules.run_fakes import short_run
from train import main


class AgainstRejected(MultiModalLitModule):
    """Likelihood of the chosen answers and unlikelihood of the others, weighted: the plainest objective over pairs."""

    @property
    def answer_form(self) -> AnswerForm:
        return AnswerForm("pairs", corrupt_media=True)

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        if not batch["examples"]:
            return None
        answer_S = answers_of_positions(batch)
        assert {"chosen", "rejected", "corrupted"} >= set(batch["answers"]["roles"]) and len(answer_S) == batch["num_supervised"]
        hidden_SD, labels_S = supervised(self(batch), batch["labels_BT"])
        total, count, _ = cross_entropy(hidden_SD, self.model.language_model.head, labels_S)
        if stage != "train":
            self.measure(batch, answer_values(self.score(batch)))
        return total, count


CONFIG = """
samples: {{num_samples: 2}}
model:
  class_path: {model}
  init_args:
    language_model: {{class_path: LanguageModel, init_args: {{name_or_path: {llm}}}}}
    image_encoder: {{class_path: HFVisionEncoder, init_args: {{name_or_path: {clip}, layer: -2}}}}
    image_projector: {{class_path: MLPProjector}}
    generation: {{max_new_tokens: 3}}
data:
  class_path: {data}
  init_args: {{train_path: {folder}/rows.jsonl, val_path: {folder}/rows.jsonl, batch_size: 2, num_workers: 0}}
"""


@pytest.mark.parametrize("data", ["ImageDataModule", "PreferenceDataModule"])
def test_a_run_over_pairs(
    data: str, tmp_path: Path, tiny_llm: Path, tiny_clip: Path, pictures: list[Image.Image], log: pytest.LogCaptureFixture
) -> None:
    for number, image in enumerate(pictures):
        image.save(tmp_path / f"{number}.png")
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": f"A bus {n}."}],
            "images": [f"{n}.png"],
            "rejected_response": "A small brown dog.",
        }
        for n in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = f"{AgainstRejected.__module__}.{AgainstRejected.__name__}"
    config = tmp_path / "config.yaml"
    config.write_text(
        short_run(tmp_path / "run") + CONFIG.format(folder=tmp_path, model=model, llm=tiny_llm, clip=tiny_clip, data=data)
    )
    main(["fit", f"--config={config}"])
    (checked,) = [message for message in log.messages if message.startswith("first step")]
    assert "in 4 rows" in checked  # two pairs, each with the chosen answer behind a corrupted picture
    assert (tmp_path / "run" / "samples.html").exists()
    with next((tmp_path / "run").rglob("metrics.csv")).open() as file:
        logged = {name: value for row in csv.DictReader(file) for name, value in row.items() if value}
    assert float(logged["train/tokens_per_s"]) > 0 and "val/loss" in logged
    assert "answer_form:" not in (tmp_path / "run" / "config.yaml").read_text()
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


def test_an_answer_that_was_cut_between_branches_needs_no_end_token(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([[8]])
    batch["labels_BT"] = torch.tensor([[-100, -100, -100, 5, 6, -100, 7, 9]])
    assert "has id 6" in problem_of_labels(batch, {9})
    batch["num_dropped_tokens"] = 3
    assert "has id 6" in problem_of_labels(batch, {9})  # in the middle of a sample nothing is cut
    batch["branches_BT"] = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]])
    assert problem_of_labels(batch, {9}) == ""
    assert problem_of_labels(batch | {"num_dropped_tokens": 0}, {9}) != ""
