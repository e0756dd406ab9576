"""Rows with pictures and pairs of answers, and unbuilt modules that compare them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.preference import PreferenceLitModule
from models.language import LanguageModel

Kind = TypeVar("Kind", bound=PreferenceLitModule)

FROZEN = Tune(mode="frozen")
LORA = Tune(mode="lora", lora=LoRA(target_modules=("q_proj", "v_proj")))

ANSWERS = (("red", "It is a bus."), ("Nobody knows.", "blue"), ("white", "a"), ("It is green.", "It is red."))


def write_pairs(
    path: Path, num_rows: int, answers: Sequence[tuple[str, str]] = ANSWERS, pictures: bool = True, **columns: Any
) -> Path:
    """A file of rows with a picture of random pixels, a chosen and a rejected answer each; every fifth has no picture."""
    generator = torch.Generator().manual_seed(num_rows)
    lines = []
    for number in range(num_rows):
        name, (chosen, rejected) = f"{path.stem}-{number}.png", answers[number % len(answers)]
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        has_picture = pictures and number % 5 != 4
        if has_picture:
            Image.fromarray(pixels.numpy()).save(path.parent / name)
        question = f"{'<image>' if has_picture else ''}What is in picture {number}?"
        row: dict[str, Any] = {
            "id": str(number),
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": chosen}],
            "rejected_response": rejected,
            "images": [name] if has_picture else [],
        }
        lines.append(json.dumps(row | columns) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_module(kind: type[Kind], llm: Path, clip: Path | None, **options: Any) -> Kind:
    """An unbuilt module: a Llama with LoRA, and with `clip` a frozen CLIP and a frozen projector."""
    parts: dict[str, Any] = {"language_model": LanguageModel(str(llm), tune=LORA)}
    if clip is not None:
        parts |= {"image_encoder": HFVisionEncoder(str(clip), layer=-2), "image_projector": MLPProjector(tune=FROZEN)}
    return kind(**(parts | options))


def sgd(lr: float = 0.1) -> Callable[[Any], torch.optim.Optimizer]:
    """An optimizer whose steps are proportional to the gradients."""
    return lambda groups: torch.optim.SGD(groups, lr=lr)


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule that changes nothing."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
