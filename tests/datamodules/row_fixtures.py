"""Fixtures over rows with pictures; `tests/conftest.py` names this file.

What they need is imported in them, since this file is read before the environment of the tests is set.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from datamodules.image import ImageDataModule
    from datamodules.processor import Processor
    from tests.datamodules.loader_fakes import RecordingDataset

NUM_ROWS = 7
"""Four batches of two an epoch, the last one smaller."""


@pytest.fixture(scope="session")
def row_processor(tmp_path_factory: pytest.TempPathFactory) -> "Processor":
    """A processor of pictures whose parts are never built."""
    from tests.datamodules.loader_fakes import make_processor

    return make_processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def recording_dataset(tmp_path: Path, row_processor: "Processor") -> "Callable[..., RecordingDataset]":
    """`recording_dataset(lines=None, **options)`: seven rows, augmented, and a record of what is asked for."""
    from datamodules.augment import ImageAugment
    from tests.datamodules.loader_fakes import RecordingDataset, write_rows

    made: list[RecordingDataset] = []

    def make(lines: dict[int, str] | None = None, processor: "Processor" = row_processor, **options: Any) -> RecordingDataset:
        path = write_rows(tmp_path / "rows.jsonl", NUM_ROWS, lines)
        dataset = RecordingDataset(str(path), str(tmp_path), processor, augment=ImageAugment(), seed=3, **options)
        dataset.record = tmp_path / f"requests{len(made)}.txt"
        made.append(dataset)
        return dataset

    return make


@pytest.fixture
def make_image_data(tmp_path: Path, row_processor: "Processor") -> "Callable[..., ImageDataModule]":
    """`make_image_data(**options)`: seven rows to train on, augmented, in batches of two."""
    from datamodules.augment import ImageAugment
    from datamodules.image import ImageDataModule
    from tests.datamodules.loader_fakes import write_rows

    path = str(write_rows(tmp_path / "rows.jsonl", NUM_ROWS))

    def make(**options: Any) -> ImageDataModule:
        defaults = {"train_path": path, "batch_size": 2, "num_workers": 0, "seed": 5, "processor": row_processor}
        return ImageDataModule(augment=ImageAugment(), **(defaults | options))

    return make
