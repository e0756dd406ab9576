"""A model of two parts, a processor and data, as small as the callbacks need them.

Shape suffixes: B rows, T tokens, N pictures, D width.
"""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.batch import IGNORE_INDEX, Batch, Example, MediaItem, Origin, RowError
from encoders.base import Part
from encoders.tuning import Tune

EOS = 9
VOCABULARY = 10
FULL = Tune()


class Words(Part):
    """Stands for a language model."""

    def __init__(self, tune: Tune = FULL) -> None:
        super().__init__(tune)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)
        self.requires_grad_(tune.mode == "full")


class Bridge(Part):
    """Stands for a projector."""

    def __init__(self, tune: Tune = FULL) -> None:
        super().__init__(tune)
        self.linear = nn.Linear(3, 4)
        self.requires_grad_(tune.mode == "full")


class FakeProcessor:
    eos_ids = (EOS,)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "processor.json").write_text('{"fake": true}')

    def __call__(self, sample: SimpleNamespace, media: dict[str, Any], generate: bool = False) -> Example:
        answer = [] if generate else [int(sample.id) % 8 + 1, EOS]
        items = [MediaItem(key, torch.ones(3), 1, 0) for key, _ in media.get("image", [])]
        return Example(
            origin=sample.origin,
            id=sample.id,
            tokens=[1, 2, *answer],
            labels=[IGNORE_INDEX] * 2 + answer,
            media={"image": items} if items else {},
            choices=None if generate else [[1, 2]] * 2,
            prompt=sample.question,
            reference=sample.reference,
        )


class FakeModule(LightningModule):
    generates = True
    on_non_finite = "stop"
    is_spread = False

    def __init__(self, words: Words | None = None, bridge: Bridge | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.words, self.bridge = words or Words(), bridge or Bridge()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.processor = FakeProcessor()
        self.detach_bridge = False
        self.asked: list[Batch] = []

    def parts(self) -> dict[str, Part]:
        return {"language_model": self.words, "image_projector": self.bridge}

    def model_spec(self) -> dict[str, Any]:
        return {"parts": {name: part.spec() for name, part in self.parts().items()}}

    def generate(self, batch: Batch) -> list[str]:
        self.asked.append(batch)
        return [f"answer {example['id']}" for example in batch["examples"]]

    def score(self, batch: Batch) -> SimpleNamespace:
        rows = len(batch["examples"])
        return SimpleNamespace(nll_B=torch.arange(1.0, rows + 1), count_B=torch.full((rows,), 2))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden_BTD = self.words.embedding(batch["tokens_BT"])
        if "image" in batch:
            projected_ND = self.bridge.linear(batch["image"]["media"])
            hidden_BTD = hidden_BTD + (projected_ND.detach() if self.detach_bridge else projected_ND).mean(0)
        logits_BTV = self.words.head(hidden_BTD[:, :-1])
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch["labels_BT"][:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self.training_step_loss(batch), batch_size=1)

    def training_step_loss(self, batch: Batch) -> Tensor:
        return self.words.head(self.words.embedding(batch["tokens_BT"])).square().mean()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        return [{**example, "response": text} for example, text in zip(batch["examples"], self.generate(batch), strict=True)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class FakeValDataset:
    """Row 1 is bad, row 2 has no picture."""

    def __init__(self, num_rows: int = 5) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def in_turn(self) -> range:
        return range(self.num_rows)

    def sample(self, row: int) -> SimpleNamespace:
        origin = Origin("val.jsonl", row + 1)
        if row == 1:
            raise RowError(origin, "no answer")
        return SimpleNamespace(origin=origin, id=str(row), question=f"<image>What is {row} < 5?", reference=f"answer {row % 3}")

    def decode(self, sample: SimpleNamespace) -> dict[str, list[tuple[str, Image.Image]]]:
        if sample.id == "2":
            return {}
        return {"image": [(sample.id, Image.new("RGB", (400, 300), (40 * int(sample.id), 90, 160)))]}


class FakeData(LightningDataModule):
    def __init__(self, batches: Iterable[Batch], val_batches: Iterable[Batch] = ()) -> None:
        super().__init__()
        self.batches, self.val_batches = list(batches), list(val_batches)
        self.val_dataset = FakeValDataset()

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset, too

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        return DataLoader(self.val_batches, batch_size=None) if self.val_batches else []  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.train_dataloader()

    def source_counts(self) -> dict[str, dict[str, int]]:
        return {"": self.row_counts()}

    def row_counts(self) -> dict[str, int]:
        return {"rows": 3000, "trained": 2980, "skipped": 15, "not_reached": 5}

    def media_counts(self) -> dict[str, int]:
        return {"image": 2900, "video": 0, "audio": 0}

    def collate(self, examples: list[Example], generate: bool = False) -> Batch:
        rows = [{"id": e.id, "file": e.origin.file, "line": e.origin.line, "prompt": e.prompt} for e in examples]
        return make_batch([example.labels for example in examples]) | {"examples": rows}


def make_batch(labels: list[list[int]], segments: list[list[int]] | None = None, image: bool = False) -> Batch:
    """A batch of rows that share one length; the tokens are drawn anew, the same for the same shape."""
    labels_BT = torch.tensor(labels)
    segments_BT = torch.ones_like(labels_BT) if segments is None else torch.tensor(segments)
    generator = torch.Generator().manual_seed(labels_BT.numel())
    num_samples = int(segments_BT.amax(dim=1).sum())
    batch = Batch(
        tokens_BT=torch.randint(VOCABULARY, labels_BT.shape, generator=generator),
        labels_BT=labels_BT,
        positions_BT=torch.arange(labels_BT.shape[1]).expand_as(labels_BT),
        segments_BT=segments_BT,
        choices_SK=torch.zeros(0, 0, dtype=torch.long),
        examples=[
            {"id": f"r{i}", "file": "train.jsonl", "line": i + 1, "reference": f"answer r{i}" if i == 0 else ""}
            for i in range(num_samples)
        ],
        skipped=[],
        num_tokens=int((segments_BT > 0).sum()),
        num_supervised=int((labels_BT[:, 1:] != IGNORE_INDEX).sum()),
        num_dropped_tokens=0,
    )
    if image:
        media = torch.randn(2, 3, generator=generator)
        index = torch.arange(2)
        batch["image"] = {"media": media, "mask": None, "item_O": index, "row_O": index, "num_tokens_O": torch.ones(2)}
    return batch


def good_batch(image: bool = True) -> Batch:
    """Two rows whose answers end in the end token."""
    return make_batch([[-100, -100, 3, EOS], [-100, 4, 5, EOS]], image=image)


def make_trainer(folder: Path, callbacks: list[Callback], **options: Any) -> Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        enable_model_summary=False,
        barebones=False,
        **options,
    )
