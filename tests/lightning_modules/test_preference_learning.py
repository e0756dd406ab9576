"""Objectives learn what rows prefer, in seconds: also what cannot be known without the picture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.cpo import CPOLitModule
from lightning_modules.dpo import DPOLitModule
from lightning_modules.kto import KTOLitModule
from lightning_modules.mdpo import MDPOLitModule
from lightning_modules.orpo import ORPOLitModule
from lightning_modules.preference import PreferenceLitModule
from lightning_modules.reward_model import RewardLitModule
from lightning_modules.simpo import SimPOLitModule
from models.language import LanguageModel
from tests.lightning_modules.preference_fakes import make_module
from tests.lightning_modules.run_fakes import make_data, make_trainer

pytestmark = pytest.mark.usefixtures("seed")

COLOURS = {"red": (220, 50, 47), "blue": (50, 90, 210)}
ALL = Tune(mode="lora", lora=LoRA(r=16, alpha=32, target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")))


def write(path: Path, split: str, num_rows: int, pictures: bool) -> Path:
    """With pictures the chosen answer is the colour that is seen; without, always the same."""
    lines = []
    for number in range(num_rows):
        right, wrong = list(COLOURS)[:: 1 if number % 2 else -1]
        name = f"{split}-{number}.png"
        if pictures:
            shade = tuple(min(255, value + 7 * (number % 5)) for value in COLOURS[right])
            Image.new("RGB", (32, 32), shade).save(path / name)
        else:
            right, wrong = list(COLOURS)
        question = "<image>Which colour?" if pictures else f"Which colour has thing {split} {number}?"
        row = {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": right}],
            "rejected_response": wrong,
            "images": [name] if pictures else [],
        }
        lines.append(json.dumps(row) + "\n")
    file = path / f"{split}.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def learn(
    kind: type[PreferenceLitModule], folder: Path, llm: Path, clip: Path | None, epochs: int, **options: Any
) -> dict[str, float]:
    """The metrics of rows that were not trained on."""
    pictures = clip is not None
    rows, held_out = write(folder, "train", 32, pictures), write(folder, "val", 16, pictures)
    options["optimizer"] = lambda groups: torch.optim.AdamW(groups, lr=5e-3)
    if pictures:
        options["image_projector"] = MLPProjector()
    module = make_module(kind, llm, clip, language_model=LanguageModel(str(llm), tune=ALL), **options)
    data = make_data(module, rows, val_path=str(held_out), batch_size=8)
    trainer = make_trainer(folder, max_epochs=epochs, check_val_every_n_epoch=epochs, gradient_clip_val=1.0)
    trainer.fit(module, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("kind", [DPOLitModule, SimPOLitModule, CPOLitModule, ORPOLitModule, RewardLitModule])
def test_separable_preferences(kind: type[PreferenceLitModule], tiny_llm: Path, tmp_path: Path) -> None:
    metrics = learn(kind, tmp_path, tiny_llm, None, epochs=3)
    assert metrics["val/rewards/accuracies"] >= 0.95


def test_feedback(tiny_llm: Path, tmp_path: Path) -> None:
    metrics = learn(KTOLitModule, tmp_path, tiny_llm, None, epochs=4)
    assert metrics["val/rewards/margins"] > 0.2
    assert metrics["val/rewards/margins"] == pytest.approx(metrics["val/rewards/chosen"] - metrics["val/rewards/rejected"])


@pytest.mark.parametrize("kind", [DPOLitModule, MDPOLitModule])
def test_preferences_that_only_the_picture_tells(
    kind: type[PreferenceLitModule], tiny_llm: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """Either colour is right half of the time: without the picture accuracy would be 0.5."""
    metrics = learn(kind, tmp_path, tiny_llm, tiny_clip, epochs=8)
    assert metrics["val/rewards/accuracies"] >= 0.95
