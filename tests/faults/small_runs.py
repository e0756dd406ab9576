"""Small runs that are hit by something, in this process or in one of their own."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

from encoders.image import HFVisionEncoder
from encoders.projectors import MLPProjector
from encoders.tuning import LoRA, Tune
from lightning_modules.checkpoints import CheckpointFile, RunCheckpoint
from lightning_modules.multimodal import MultiModalLitModule
from models.language import LanguageModel
from tests.lightning_modules.run_fakes import make_data, make_trainer

DROPOUT = Tune(mode="lora", lora=LoRA(dropout=0.3))


def make_module(
    llm: Path, clip: Path, kind: type[MultiModalLitModule] = MultiModalLitModule, **options: Any
) -> MultiModalLitModule:
    """An unbuilt module with dropout, whose encoder is frozen."""
    return kind(LanguageModel(str(llm), tune=DROPOUT), HFVisionEncoder(str(clip), layer=-2), MLPProjector(), **options)


def fit(module: MultiModalLitModule, folder: Path, rows: Path, *callbacks: Callback, **options: Any) -> Any:
    """Fits in accumulated steps of two batches of two rows, and returns the trainer. Options named `data` go to the rows."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(4)
    checkpoint = options.pop("checkpoint", None) or RunCheckpoint(every_n_epochs=9)
    resume, plugins = options.pop("resume", None), [options.pop("files", None) or CheckpointFile(), *options.pop("plugins", [])]
    data = make_data(module, rows, **options.pop("data", {}))
    defaults = {"max_epochs": 2, "accumulate_grad_batches": 2}
    trainer = make_trainer(folder, checkpoint, *callbacks, plugins=plugins, **(defaults | options))
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer


def end_state(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run holds: weights, optimizer, scheduler, generators and place."""
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "rng", "ImageDataModule", "global_step")
    return {name: checkpoint[name] for name in names}


def same(first: Any, second: Any) -> bool:
    """Whether nested states are equal, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)
