"""How much of a batch each row takes, known from its text and the headers of its media, and kept from run to run."""

import hashlib
import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.answer_examples import answer_example
from datamodules.answer_rows import answer_rows
from datamodules.batch import MODALITIES, Example, RowError
from datamodules.content import Media
from datamodules.packing import RowSizes
from datamodules.parts import Prepared

if TYPE_CHECKING:
    import lightning as L

    from datamodules.dataset import MultiModalDataset
    from datamodules.loader import RowLoader
    from datamodules.row_dataset import RowDataset

log = logging.getLogger(__name__)


def row_size(dataset: "MultiModalDataset", row: int) -> tuple[int, int]:
    """See `RowDataset.size`: the example is made, but of media whose tensors are empty.

    Raises:
        RowError: The row cannot be used.
    """
    processor, form = dataset.processor, dataset.answer_form
    if not processor.takes_prepared:  # its media take about as many tokens in its tower as in the row
        samples = dataset.samples(row)
        media = {(modality, medium) for modality in MODALITIES for sample in samples for medium in sample.media(modality)}
        encoded = sum(processor.num_tokens(modality, dataset.shape(medium, samples[0])) for modality, medium in media)
        return dataset.num_tokens(row), encoded
    features: dict[str, int] = {}
    sample = dataset.samples(row)[0]

    def outline(medium: Media, place: int, mark: str = "") -> tuple[str, Prepared]:
        key = f"{medium}{mark}"
        features[key] = processor.encoders[medium.modality].num_tokens(dataset.shape(medium, sample))
        return key, Prepared(torch.empty(0), features[key])

    if form.kind == "single":
        processor.check_media(sample)
        outlines = {modality: [outline(medium, 0) for medium in sample.media(modality)] for modality in processor.encoders}
        example: Example = processor(sample, outlines, generate=dataset.generate)
    else:
        candidates = dataset.candidates(row)
        example = answer_example(candidates, processor, form, outline, lambda medium, place: outline(medium, place, "~"))
    rows, _ = answer_rows([example])
    return sum(len(own.tokens) for own in rows), sum(features.values())


def row_sizes(dataset: "RowDataset", num_workers: int) -> RowSizes:
    """The sizes of all rows of a dataset, one source after the other; 0 of a row that cannot be used.

    They are kept in the user's cache folder, and found there as long as file, media limits, processor and objective are the
    same. (The media are looked at once: a picture that is replaced by a larger one makes a pack longer than was planned.)

    Args:
        dataset: The rows.
        num_workers: Processes that read the headers; 0: this one does it.
    """
    sizes = [_of_source(source, num_workers) for source in dataset.sources]
    return RowSizes(*(np.concatenate(parts) for parts in zip(*sizes, strict=True)))


def _of_source(source: "MultiModalDataset", num_workers: int) -> RowSizes:
    place = _place(source)
    if place.is_file():
        return RowSizes(*np.load(place, allow_pickle=False))
    log.warning("%s: looking at the sizes of %s rows, once, to fill batches with them", source.file.path, f"{len(source):,}")
    own = torch.Generator()  # a loader that draws from the global one would make the first run another one than later ones
    loader = DataLoader(_Sizes(source), batch_size=256, num_workers=num_workers, collate_fn=list, generator=own)
    sizes_2R = np.array([size for sizes in loader for size in sizes], np.int32).reshape(-1, 2).T
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            np.save(file, sizes_2R)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
    return RowSizes(*sizes_2R)


def once_a_machine(loader: "RowLoader", trainer: "L.Trainer | None") -> None:
    """Lets one process of each machine look at the sizes that a loader needs, so that the others find what it wrote down.

    Args:
        loader: The loader.
        trainer: Knows the processes; None: there is one.
    """
    if trainer is None or loader.batches.batching.kind == "rows":
        return
    if trainer.local_rank == 0:
        loader.sizes()
    trainer.strategy.barrier("sizes of the rows")


class _Sizes(Dataset[tuple[int, int]]):
    """The size of each row."""

    def __init__(self, source: "MultiModalDataset") -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> tuple[int, int]:
        try:
            return self.source.size(row)
        except RowError:  # its turn in a batch names it
            return 0, 0


def _place(source: "MultiModalDataset") -> Path:
    """Where the sizes of a source are kept: under a hash of all that they depend on but the media themselves."""
    status = source.file.path.stat()
    told = (
        str(source.file.path.resolve()),
        status.st_size,
        status.st_mtime_ns,
        str(source.media_root.path),
        source.prompt_template,
        source.limits,
        source.answer_form,
        source.judge is not None and source.judge.builds,
        source.processor.fingerprint(),
        hashlib.sha256(np.asarray(source.rows, np.int64).tobytes()).hexdigest(),
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "omnilit" / "sizes" / f"{hashlib.sha256(repr(told).encode()).hexdigest()}.npy"
