"""How much of a batch each row takes, known from its text and the headers of its media, and kept from run to run."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.answer_examples import answer_example
from datamodules.answer_rows import answer_rows
from datamodules.batch import MODALITIES, Example, RowError
from datamodules.content import Media
from datamodules.data_order import SIZES, hash_of_sizes
from datamodules.kept_sizes import keep, kept_sizes, place_of, place_of_run
from datamodules.packing import RowSize, RowSizes
from datamodules.parts import Prepared

if TYPE_CHECKING:
    import lightning as L

    from datamodules.dataset import MultiModalDataset
    from datamodules.loader import RowLoader
    from datamodules.row_dataset import RowDataset

log = logging.getLogger(__name__)

_SECONDS = 60.0
"""Processes meet so often while one of them looks at sizes; the timeout of their group is minutes."""
_ROWS = 256
"""Rows that a worker looks at at a time."""


def row_size(dataset: "MultiModalDataset", row: int) -> RowSize:
    """See `RowDataset.size`: the example is made, but of media whose tensors are empty.

    Raises:
        RowError: The row cannot be used.
    """
    processor, form = dataset.processor, dataset.answer_form
    if not processor.takes_prepared:  # its media take about as many tokens in its tower as in the row
        samples = dataset.samples(row)
        media = {(modality, medium) for modality in MODALITIES for sample in samples for medium in sample.media(modality)}
        encoded = sum(processor.num_tokens(modality, dataset.shape(medium, samples[0])) for modality, medium in media)
        lengths = dataset.lengths(row)
        return RowSize(sum(lengths), encoded, len(lengths), max(lengths))
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
    lengths = [len(own.tokens) for own in rows]
    return RowSize(sum(lengths), sum(features.values()), len(lengths), max(lengths))


def row_sizes(dataset: "RowDataset", num_workers: int) -> RowSizes:
    """The sizes of all rows of a dataset, one source after the other; 0 of a row that cannot be used.

    They are kept in the user's cache folder, and found there as long as file, media limits, processor and objective are the
    same. (The media are looked at once: a picture that is replaced by a larger one makes a pack longer than was planned.)
    A row that could not be used is looked at again the next time. What a run begins with is kept beside that, and it goes on
    with it.

    Args:
        dataset: The rows.
        num_workers: Processes that read the headers; 0: this one does it.
    """
    looks = [_Look(source, num_workers) for source in dataset.sources]
    _go_on(looks, math.inf)
    return _of_all(looks)


class SizesOnce:
    """The sizes of all rows of a dataset; they are looked at when they are first asked for, or told before that.

    It is no method of the loader: one that holds itself so is only freed by the garbage collector, which ends the feeding of its
    workers first, so that they do not hear that they are to stop, and are waited for 5 seconds each.

    Args:
        dataset: The rows.
        num_workers: Processes that read the headers; 0: this one does it.

    Attributes:
        known: The sizes; None: nobody has asked yet.
    """

    def __init__(self, dataset: "RowDataset", num_workers: int) -> None:
        self.dataset = dataset
        self.num_workers = num_workers
        self.known: RowSizes | None = None

    def __call__(self) -> RowSizes:
        if self.known is None:
            self.known = row_sizes(self.dataset, self.num_workers)
        return self.known


def agree_on_sizes(loader: "RowLoader", trainer: "L.Trainer | None") -> None:
    """Lets the first process look at the sizes that a loader needs, and tells them to the others, which plan the same with them.

    It may take hours. So the processes meet every minute: a collective operation that waits longer than its timeout would end
    the run. What has been looked at by then is kept.

    Args:
        loader: The loader.
        trainer: Knows the processes; None: there is one.
    """
    if trainer is None or loader.batches.batching.kind == "rows":
        return
    # a run that goes on keeps the sizes, and with them the packs, that it began with
    sources, again = loader.dataset.sources, trainer.ckpt_path is None
    sizes = _begun_with(sources, trainer) if trainer.global_rank == 0 and not again else None
    looks = [_Look(source, loader.num_workers, again) for source in sources] if trainer.global_rank == 0 and sizes is None else []
    is_done = False
    while not is_done:
        is_done = trainer.strategy.reduce_boolean_decision(_go_on(looks, _SECONDS))
    if looks:
        sizes = _of_all(looks)
        place = place_of_run(sources, hash_of_sizes(sizes))
        if kept_sizes(place, len(sizes.tokens_R)) is None:
            keep(place, np.concatenate([look.sizes_4R for look in looks], axis=1))
    loader.sizes.known = trainer.strategy.broadcast(sizes)


def _begun_with(sources: "Sequence[MultiModalDataset]", trainer: "L.Trainer") -> RowSizes | None:
    """The sizes that a run began with which goes on from a checkpoint; None: they are not kept here.

    Under some strategies the checkpoint is taken up after the batches of an epoch have been counted: so it is asked itself.
    """
    attached: Any = trainer  # declared too narrowly
    path, name = Path(str(trainer.ckpt_path)), type(attached.datamodule).__qualname__
    file = path / "meta.pt" if path.is_dir() else path  # of a folder of shards it is what has no shards
    checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    own = checkpoint.get(name, {}).get("train", {}).get("order", {}).get(SIZES)
    kept = None if own is None else kept_sizes(place_of_run(sources, own), sum(map(len, sources)))
    return None if kept is None else RowSizes(*kept)


class _Look:
    """A look at the sizes of the rows of a source, with breaks; they are kept from run to run.

    Args:
        source: The rows.
        num_workers: Processes that read the headers; 0: this one does it.
        again: Look again at rows that could not be used.
    """

    def __init__(self, source: "MultiModalDataset", num_workers: int, again: bool = True) -> None:
        self.source = source
        self.num_workers = num_workers
        self._place = place_of(source)
        kept = kept_sizes(self._place, len(source))
        # 0 tokens: the row could not be used; below: it has not been looked at
        self.sizes_4R = np.full((4, len(source)), -1, np.int32) if kept is None else kept
        self._ahead = np.flatnonzero(self.sizes_4R[0] < again)
        if len(self._ahead):
            log.warning(
                "%s: looking at the sizes of %s rows, to fill batches with them", source.file.path, f"{len(self._ahead):,}"
            )

    @property
    def is_done(self) -> bool:
        """Whether all rows have been looked at."""
        return not len(self._ahead)

    def go_on(self, deadline: float) -> None:
        """Looks at more rows, some hundreds at least.

        Args:
            deadline: Behind those it stops at this time of `time.monotonic`.
        """
        own = torch.Generator()  # a loader that draws from the global one would make the first run another one than later ones
        rows = _Sizes(self.source, self._ahead)
        loader = DataLoader(rows, batch_size=_ROWS, num_workers=self.num_workers, collate_fn=list, generator=own)
        num_done = 0
        for sizes in loader:
            self.sizes_4R[:, self._ahead[num_done : num_done + len(sizes)]] = np.array(sizes, np.int32).T
            num_done += len(sizes)
            if time.monotonic() >= deadline:
                break
        self._ahead = self._ahead[num_done:]
        keep(self._place, self.sizes_4R)


def _go_on(looks: Sequence[_Look], seconds: float) -> bool:
    """Looks at more rows, of one source after the other, for so long in all; whether all have been looked at."""
    deadline = time.monotonic() + seconds
    for look in looks:
        if not look.is_done:
            look.go_on(deadline)
            if time.monotonic() >= deadline:
                break
    return all(look.is_done for look in looks)


def _of_all(looks: Sequence[_Look]) -> RowSizes:
    return RowSizes(*np.concatenate([look.sizes_4R for look in looks], axis=1))


class _Sizes(Dataset[RowSize]):
    """The sizes of some rows."""

    def __init__(self, source: "MultiModalDataset", rows: np.ndarray) -> None:
        self.source = source
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> RowSize:
        try:
            return self.source.size(int(self.rows[place]))
        except RowError:  # its turn in a batch names it
            return RowSize(0, 0, 0, 0)
