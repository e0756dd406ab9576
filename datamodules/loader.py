"""Loaders that keep account of every row, and one that can stop anywhere and go on there."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from datamodules.batch import MODALITIES, Batch, Modality
from datamodules.batching import Batching
from datamodules.cache import CacheOptions
from datamodules.collate import Collate
from datamodules.data_order import check_order, data_order
from datamodules.judgements import Judgements
from datamodules.portion import Portion
from datamodules.row_dataset import RowDataset
from datamodules.row_sizes import SizesOnce
from datamodules.sampler import GlobalBatches, RowSampler
from datamodules.score_ranges import ENOUGH
from datamodules.skipped import SkippedRows
from datamodules.step_counts import Counts, count_ahead
from datamodules.worker_signals import obey_owner_alone, worker_context

log = logging.getLogger(__name__)


class RowLoader:
    """Batches of a dataset, all of an epoch's in each loop over it.

    A row that cannot be used leaves a gap: its batch is smaller, and may be empty, so that the other rows come in the
    same batches, in the same order and with the same augmentation as if it were good. To take the bad rows out of the
    file instead numbers the rows anew, and so deals them to other batches.

    Each loop over it is the next epoch, also where the loop before was left early. The global random generator of torch
    is neither read nor advanced.

    It holds a `DataLoader` and is none, so that no `Trainer` makes it anew around a sampler of its own: the ranks'
    shares are dealt here, with and without `use_distributed_sampler`.

    Args:
        dataset: Rows to load.
        batch_size: Rows a batch, on each rank.
        skipped: Where skipped rows are named, by the name of their source.
        weights: Passes over the rows of a source an epoch, by its name; without one: each row once.
        shuffle: A new order of rows each epoch.
        seed: Seed of the orders.
        num_workers: Processes that read and decode, kept from epoch to epoch; 0: this one does it.
        rank: This process.
        world_size: Number of processes.
        media_cache: Where decoded and transformed media are kept; None: nowhere.
        batching: What a batch has `batch_size` of.
        judgements: Keeps account of what reward criteria do; None: there are none.
        batches_a_step: Batches that an optimizer step accumulates.
    """

    def __init__(
        self,
        dataset: RowDataset,
        batch_size: int,
        skipped: Mapping[str, SkippedRows],
        weights: Mapping[str, float] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        media_cache: CacheOptions | None = None,
        batching: Batching = Batching(),  # it is frozen
        judgements: Judgements | None = None,
        batches_a_step: int = 1,
    ) -> None:
        self.dataset = dataset
        self.judgements = judgements
        self.skipped = skipped
        self.num_workers = num_workers
        self.media_cache = media_cache
        self.sizes = SizesOnce(dataset, num_workers)
        weights = weights or {}
        self.portions = {s.name: Portion(len(s), weights.get(s.name, 1.0), s.seed) for s in dataset.sources}
        self.rows = RowSampler(list(self.portions.values()), shuffle, seed)
        self.batches = GlobalBatches(self.rows, batch_size, rank, world_size, batching, self.sizes, batches_a_step)
        self.counts: Counter[str] = Counter()
        self._loader: DataLoader[Batch] | None = None
        self._next_report = 1

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.rows.begin(len(self))
        if self.rows.batch == 0:
            self.counts.clear()
        if self._loader is None:
            self._loader = self._start()
        failure: ValueError | None = None
        for batch in self._ahead(self._loader):
            try:
                self._account(batch)
            except ValueError as error:
                failure = error
                break
            yield batch
        if failure is not None:
            # behind the loop: kept alive by the traceback, its workers would take 5 seconds each to end
            self.stop_workers()
            raise failure
        if self.judgements is not None:
            self.judgements.report(2 if self.batches.world_size == 1 else ENOUGH)  # others may tell more apart

    def row_counts(self) -> dict[str, int]:
        """Rows of the epoch at hand, on this rank: rows = trained + skipped + not_reached; and its dropped_tokens."""
        total: Counter[str] = Counter()
        for counts in self.source_counts().values():
            total.update(counts)
        return {**total, "dropped_tokens": self.counts["dropped_tokens"]}

    def source_counts(self) -> dict[str, dict[str, int]]:
        """The rows of `row_counts` by the name of their source."""
        counts: dict[str, dict[str, int]] = {}
        for name, rows in zip(self.portions, map(len, self.batches.own_rows(len(self))), strict=True):
            trained, skipped = (self.counts[_key(kind, name)] for kind in ("trained", "skipped"))
            counts[name] = {"rows": rows, "trained": trained, "skipped": skipped, "not_reached": rows - trained - skipped}
        return counts

    def media_counts(self) -> dict[Modality, int]:
        """Media delivered in the epoch at hand, on this rank; one that stands in several rows counts each time."""
        return {modality: self.counts[modality] for modality in MODALITIES}

    def stop_workers(self) -> None:
        """Ends the processes that decode, as soon as no loop is under way; the next loop starts new ones."""
        self._loader = None

    def _start(self) -> DataLoader[Batch]:
        for source in self.dataset.sources:
            source.open_caches(self.media_cache)
        if self.batches.batch_size == 1 and any(source.answer_form.mismatched for source in self.dataset.sources):
            log.warning("data.batch_size is 1, so that no row gets the answer of another: the divergence is not estimated")
        return DataLoader(
            self.dataset,  # type: ignore[arg-type]  # the collate function makes batches of its examples
            batch_sampler=self.batches,
            collate_fn=Collate(self.dataset.processor.pad_id, "left" if self.dataset.generate else "right"),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # its own: a loader that draws its workers' seeds from the global one changes what dropout draws after a resume
            generator=torch.Generator().manual_seed(self.rows.seed),
            multiprocessing_context=worker_context(self.num_workers),
            worker_init_fn=obey_owner_alone,
        )

    def _ahead(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return batches

    def _account(self, batch: Batch) -> None:
        """Counts the rows of a batch that is about to be handed out."""
        if self.judgements is not None:
            self.judgements.add(batch)
        self.counts.update(_key("skipped", error.origin.source) for error in batch["skipped"])
        for name, skipped in self.skipped.items():
            skipped.add([error for error in batch["skipped"] if error.origin.source == name])
        continues_B = batch["answers"]["continues_B"] if "answers" in batch else [False] * len(batch["examples"])
        first_rows = [row for row, continues in enumerate(continues_B) if not continues]
        self.counts.update(_key("trained", batch["examples"][row].get("source", "")) for row in first_rows)
        self.counts["dropped_tokens"] += batch["num_dropped_tokens"]
        for modality in MODALITIES:
            if modality in batch:
                self.counts[modality] += int(torch.isin(batch[modality]["row_O"], torch.tensor(first_rows)).sum())
        self.rows.batch += 1
        if (dropped := self.counts["dropped_tokens"]) >= self._next_report:
            log.warning("%d token(s) cut from answers in this epoch, since prompt.on_too_long is cut", dropped)
            self._next_report = 2 * dropped  # a few lines, however many rows there are


class Progress(NamedTuple):
    """How far a trainer is: its epoch, and how many batches it has finished, in all epochs together; and how it steps: batches of
    an optimizer step, and batches that it takes of an epoch."""

    epoch: int
    batches_done: int
    step_size: int = 1
    num_batches: float = math.inf


class StatefulLoader(RowLoader):
    """A `RowLoader` whose state is the place in the epoch: a few numbers, restored without reading what was read.

    It is for training. An evaluation begins at its first row, always, and so takes a `RowLoader`.

    Args:
        progress: Says how far the trainer is: which epoch a loop is, and whether the batch at hand was finished when a
            stopped run is saved. None: each loop is the next epoch, and a batch that is handed out counts as finished.

    Attributes:
        step_counts: Counts a batch, where a batch is to tell what its optimizer step counts; None: it need not.
    """

    def __init__(self, *args: Any, progress: Callable[[], Progress] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress = progress
        self.step_counts: Counts | None = None
        self._before: tuple[dict[str, Any], int] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.progress is not None:
            self.rows.set_epoch(self.progress().epoch)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was finished."""
        place = self._place()
        if self.progress is not None and self._before is not None:
            before, batches_done = self._before
            if self.progress().batches_done == batches_done:
                place = before
        return {**place, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at a saved place.

        Raises:
            ValueError: It is a place in another order of rows, or in other rows, or inside of a batch.
        """
        check_order(state["order"], self._order)
        self.rows.go_to(state["epoch"], self.batches.batch_behind(state["units"]))
        self.counts = Counter(state["counts"])
        if self.batches.world_size > 1:
            self._share_out()
        self._before = None

    @staticmethod
    def together(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The states of all processes as one: they are at the same place, and their counts are added up."""
        counts: Counter[str] = Counter()
        for state in states:
            counts.update(state["counts"])
        return {**states[0], "counts": dict(counts)}

    def _share_out(self) -> None:
        """Takes a share of the counts of all processes: its own rows before the place; of the rest the first process all."""
        others = (*MODALITIES, "dropped_tokens")
        self.counts = Counter({kind: self.counts[kind] for kind in others if self.batches.rank == 0})
        for source, rows_R in zip(self.dataset.sources, self.batches.own_rows(self.rows.batch), strict=True):
            named = [row for line in self.skipped[source.name].named_lines() if (row := source.row_of(line)) is not None]
            skipped = int(torch.isin(rows_R, torch.tensor(named, dtype=rows_R.dtype)).sum())
            self.counts[_key("skipped", source.name)] = skipped
            self.counts[_key("trained", source.name)] = len(rows_R) - skipped

    def _ahead(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        if self.step_counts is None or self.progress is None:
            return batches
        *_, step_size, num_batches = self.progress()
        return count_ahead(batches, self.step_counts, self.rows.batch, step_size, num_batches)

    def _account(self, batch: Batch) -> None:
        if self.progress is not None:
            self._before = self._place(), self.progress().batches_done
        super()._account(batch)

    def _place(self) -> dict[str, Any]:
        units = self.rows.batch * self.batches.global_size
        return {"epoch": self.rows.epoch, "units": units, "counts": dict(self.counts)}

    @cached_property
    def _order(self) -> dict[str, Any]:
        return data_order(self.dataset.sources, self.batches, self.sizes)


def _key(kind: str, source: str) -> str:
    return f"{kind}/{source}" if source else kind
