"""Rows with small random pictures, and the processor of a model that is never built.

Shape suffixes: C channels, H height, W width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import Batch, MediaItem
from datamodules.dataset import MultiModalDataset
from datamodules.loader import RowLoader, StatefulLoader
from datamodules.processor import Processor, PromptOptions
from datamodules.row_dataset import RowKey
from datamodules.skipped import SkippedRows
from encoders.base import Encoder, MediaShape, Projector
from encoders.tuning import Tune
from tests.tiny import make_tokenizer


def pixels(image: Image.Image) -> Tensor:
    """pixels_CHW."""
    return torch.tensor(list(image.resize((4, 4)).tobytes()), dtype=torch.float32).view(4, 4, 3).permute(2, 0, 1)


class PixelEncoder(Encoder):
    transform = staticmethod(pixels)
    hidden_size = 3

    def __init__(self, num_features: int = 2) -> None:
        super().__init__(Tune())
        self.num_features = num_features

    def build(self) -> None:
        raise AssertionError("the data side needs no weights")

    def num_tokens(self, shape: MediaShape) -> int:
        return self.num_features

    def forward(self, media: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("the data side runs no model")


class EvenProjector(Projector):
    def __init__(self) -> None:
        super().__init__(Tune())

    def build(self, in_features: int, out_features: int) -> None:
        raise AssertionError("the data side needs no weights")

    def num_tokens(self, num_features: int) -> int:
        if num_features % 2:
            raise ValueError(f"an even number of features is needed, got {num_features}")
        return num_features // 2

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        raise AssertionError("the data side runs no model")


def make_processor(folder: Path, prompt: PromptOptions = PromptOptions(), num_features: int = 2) -> Processor:
    if not (folder / "tokenizer.json").exists():
        make_tokenizer(folder, "chatml")
    return Processor(str(folder), prompt, {"image": PixelEncoder(num_features=num_features)}, {"image": EvenProjector()})


def make_row(number: int, image: str | None = None, answer: str | None = None) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"{'' if image is None else '<image>'}What is {number}?"},
        {"role": "assistant", "content": answer or f"It is {number}."},
    ]
    return {"id": str(number), "messages": messages, "images": [] if image is None else [image]}


def write_rows(path: Path, num_rows: int, lines: dict[int, str] | None = None) -> Path:
    """A file of rows, each with a picture of its own; `lines` replaces some of its lines, counted from 0."""
    generator = torch.Generator().manual_seed(num_rows)
    written = []
    for number in range(num_rows):
        picture = path.parent / f"{number}.png"
        if not picture.exists():
            content = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(content.numpy()).save(picture)
        written.append(json.dumps(make_row(number, picture.name)))
    for number, line in (lines or {}).items():
        written[number] = line
    path.write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
    return path


class RecordingDataset(MultiModalDataset):
    """Writes down each row that is asked for, in a file, since workers have memories of their own."""

    record: Path

    def __getitems__(self, keys: Sequence[int | RowKey]) -> Any:
        with self.record.open("a") as file:
            file.writelines(f"{key.epoch} {key.row}\n" for key in keys if isinstance(key, RowKey))
        return super().__getitems__(keys)

    def requests(self) -> list[tuple[int, int]]:
        """(epoch, row) of what was asked for so far."""
        if not self.record.exists():
            return []
        return [(int(epoch), int(row)) for epoch, row in (line.split() for line in self.record.read_text().splitlines())]


def make_loader(
    dataset: MultiModalDataset, batch_size: int = 2, max_skipped: float = 1.0, folder: Path | None = None, **options: Any
) -> StatefulLoader:
    skipped_path = None if folder is None else folder / "skipped.jsonl"
    skipped = {"": SkippedRows(skipped_path, str(dataset.file.path), len(dataset.file), max_skipped)}
    return StatefulLoader(dataset, batch_size, skipped, **({"shuffle": True, "seed": 3} | options))


def ids(batches: Sequence[Batch]) -> list[list[str]]:
    return [[example["id"] for example in batch["examples"]] for batch in batches]


def epochs(loader: RowLoader, number: int) -> list[Batch]:
    return [batch for _ in range(number) for batch in loader]


def take(loader: StatefulLoader, number: int) -> list[Batch]:
    """The next batches, across the ends of epochs."""
    batches: list[Batch] = []
    while len(batches) < number:
        for batch in loader:
            batches.append(batch)
            if len(batches) == number:
                break
    return batches


def same(left: Batch, right: Batch) -> bool:
    """Whether two batches are equal, bit for bit."""
    return _plain(left) == _plain(right)


def _plain(value: Any) -> Any:
    match value:
        case Tensor():
            return value.dtype, value.tolist()
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case Exception():
            return str(value)
    assert not isinstance(value, MediaItem)
    return value
