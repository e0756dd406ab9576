"""Rows with pictures, and what it takes to train on them in a second."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

from datamodules.batch import Batch, Example
from datamodules.image import ImageDataModule
from lightning_modules.multimodal import MultiModalLitModule
from models.spread import whole

COLOURS = ("red", "blue", "white")


def write_rows(path: Path, num_rows: int, answers: Sequence[str] = ("red", "It is a bus.", "blue", "white")) -> Path:
    """A file of rows with a picture of random pixels each. An answer that is a colour is one of three choices; every fifth
    row has no picture."""
    generator = torch.Generator().manual_seed(num_rows)
    lines = []
    for number in range(num_rows):
        name, answer = f"{path.stem}-{number}.png", answers[number % len(answers)]
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path.parent / name)
        has_picture = number % 5 != 4
        question = f"{'<image>' if has_picture else ''}What is in picture {number}?"
        row: dict[str, Any] = {
            "id": str(number),
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": [name] if has_picture else [],
        }
        lines.append(json.dumps(row | ({"choices": COLOURS} if answer in COLOURS else {})) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_data(module: MultiModalLitModule, rows: Path, **options: Any) -> ImageDataModule:
    """All splits are of the same file; without worker processes, unless the options say so."""
    paths = dict.fromkeys(("train_path", "test_path", "predict_path"), str(rows))
    of_model = {"processor": module.processor, "answer_form": module.answer_form}
    defaults = {**paths, "batch_size": 2, "num_workers": 0, "seed": 5, **of_model}
    return ImageDataModule(**(defaults | options))


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    checkpoints = {"enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks)}
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **(quiet | checkpoints | defaults | options))


def short_run(folder: Path, max_epochs: int = 1) -> str:
    """The trainer of a configuration: a run into a folder, in silence, that logs each step to a file."""
    return f"""
trainer:
  default_root_dir: {folder}
  accelerator: cpu
  max_epochs: {max_epochs}
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  logger: {{class_path: CSVLogger, init_args: {{name: csv}}}}
"""


def examples(data: ImageDataModule, generate: bool = False) -> list[Example]:
    """The rows of the file, one by one; with `generate` as prompts."""
    dataset = data.dataset("predict" if generate else "test")
    return [dataset[row] for row in range(len(dataset))]


def batches(data: ImageDataModule, generate: bool = False) -> list[Batch]:
    """Each row as a batch of its own."""
    return [data.collate([example], generate=generate) for example in examples(data, generate)]


def weights(module: MultiModalLitModule) -> dict[str, torch.Tensor]:
    """A copy of all weights and statistics, whole also where they are spread over processes, which must meet here."""
    return {name: whole(tensor).detach().clone() for name, tensor in module.model.state_dict().items()}


class Watch(Callback):
    """Calls a function at the end of each training batch."""

    def __init__(self, look: Callable[[Trainer, MultiModalLitModule], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(trainer, pl_module)
