"""The LightningDataModule under all others: datasets of the splits, their loaders, and the place in the epoch."""

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.answer_form import AnswerForm
from datamodules.augment import Augment
from datamodules.batch import Batch, Example, Modality, RowError
from datamodules.batching import Batching
from datamodules.cache import CacheOptions
from datamodules.collate import collate
from datamodules.dataset import MultiModalDataset
from datamodules.jsonl import JsonlFile
from datamodules.loader import Progress, RowLoader, StatefulLoader
from datamodules.mixture_dataset import MixtureDataset
from datamodules.processor import Processor
from datamodules.row_dataset import RowDataset
from datamodules.row_sizes import agree_on_sizes
from datamodules.skipped import SkippedRows
from datamodules.source import Source, Split, check_option, names_with_rows, source_option
from datamodules.split import Rows, hold_out_rows
from datamodules.step_counts import Counts

log = logging.getLogger(__name__)

Loader = TypeVar("Loader", bound=RowLoader)


class RowDataModule(L.LightningDataModule):
    """Loaders over the rows of one source or several. A subclass says which, by `sources`.

    Args:
        batch_size: Rows a training batch, on each device.
        eval_batch_size: Rows a batch elsewhere; None: as in training.
        num_workers: Processes that read and decode, on each device; 0: none of their own.
        shuffle: Train in a new order each epoch; False: in the order of the file.
        max_skipped: Share of the rows of a split (in a mixture: of each source in it) that may be skipped (bad media, too
            long, malformed) before the run stops, rounded down; one row may be in any case, however few there are, unless
            this is 0.
        seed: Seed of the order of the rows, of the split and of the augmentation.
        media_cache: Keeps decoded and transformed media on disk, so that an epoch after the first, or another run, does not
            decode them again; None: does not. Media that are augmented at random are not kept.
        batching: How training rows become batches: so many rows, as many of like length as fit, or packs.
        processor: Comes from the model; not set by hand.
        answer_form: Comes from the model; not set by hand.
    """

    def __init__(
        self,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        shuffle: bool = True,
        max_skipped: float = 0.01,
        seed: int = 0,
        media_cache: CacheOptions | None = None,
        batching: Batching = Batching(),  # it is frozen
        processor: Processor | None = None,
        answer_form: AnswerForm | None = None,
    ) -> None:
        super().__init__()
        check_option("data.max_skipped", max_skipped, "a share of the rows, in [0, 1]", 0 <= max_skipped <= 1)
        check_option("data.batch_size", batch_size, "a number of rows, at least 1", batch_size >= 1)
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        check_option("data.eval_batch_size", eval_batch_size, "a number of rows, at least 1", eval_batch_size >= 1)
        check_option("data.num_workers", num_workers, "a number of processes, 0 or more (0: none of their own)", num_workers >= 0)
        check_option("data.seed", seed, "a whole number in [0, 2^32)", 0 <= seed < 2**32)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.max_skipped = max_skipped
        self.seed = seed
        self.media_cache = media_cache
        self.batching = batching
        self.processor = processor
        self.answer_form = AnswerForm() if answer_form is None else answer_form
        self.train_loader: StatefulLoader | None = None
        self.step_counts: Counts | None = None  # the model's, see `StatefulLoader`
        self._resume_state: dict[str, Any] | None = None
        self._loaders: list[RowLoader] = []

    @property
    @abstractmethod
    def sources(self) -> Mapping[str, Source]:
        """Where the rows come from, by name; the name of a single one is empty."""

    @abstractmethod
    def augments(self, name: str) -> Mapping[Modality, Augment]:
        """Random augmentation of the training media of a source, by modality."""

    def dataset(self, split: Split, rows: Rows | None = None) -> RowDataset:
        """The dataset of a split, augmented where it trains.

        Args:
            split: Which one.
            rows: Which rows of the file, by the name of the source; all of those that are not named.

        Raises:
            ValueError: The split has no file, or a file, a media root or a prompt template cannot be used.
        """
        datasets = {
            name: self.source_dataset(split, name, (rows or {}).get(name)) for name in names_with_rows(self.sources, split)
        }
        return datasets[""] if "" in datasets else MixtureDataset(list(datasets.values()))

    def source_dataset(self, split: Split, name: str, rows: Sequence[int] | None = None) -> MultiModalDataset:
        """The part of a split's dataset that comes from one source.

        Args:
            split: Which one; the source must have a file for it.
            name: The name of the source.
            rows: Which rows of the file; None: all.

        Raises:
            ValueError: The file, the media root or the prompt template cannot be used.
        """
        source, option = self.sources[name], source_option(name)
        try:
            JsonlFile(str(source.path(split)))
        except ValueError as error:
            raise ValueError(f"{option}.{source.path_option(split)}: {error}") from error
        processor, augment = self._processor(), self.augments(name) if split == "train" else None
        try:
            return source.dataset(split, processor, augment, name, self.seed, rows, self.answer_form)
        except ValueError as error:
            raise ValueError(f"{option}: {error}" if name else str(error)) from error

    def has_val(self) -> bool:
        """Whether there are validation rows."""
        return any(source.path("val") is not None for source in self.sources.values())

    def setup(self, stage: str) -> None:
        """Opens the files that `stage` needs.

        Raises:
            ValueError: One of them, or an option, cannot be used.
        """
        if stage == "fit":
            self.train_loader = None
            train_rows, val_rows = self.held_out_rows()
            self.train_dataset = self._open("train", train_rows)
            if self.has_val():
                self.val_dataset = self._open("val", val_rows)
        elif stage == "validate":
            self.val_dataset = self._open("val", self.held_out_rows()[1])
        elif stage == "test":
            self.test_dataset = self._open("test")
        elif stage == "predict":
            self.predict_dataset = self._open("predict")

    def teardown(self, stage: str) -> None:
        """Ends the worker processes."""
        for loader in self._loaders:
            loader.stop_workers()
        self._loaders.clear()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the worker processes of a run that is stopped."""
        self.teardown("fit")

    def train_dataloader(self) -> StatefulLoader:
        """Training batches; made once for each fit, and it goes on where a resumed run stopped."""
        if self.train_loader is None:
            trainer: Any = self.trainer  # declared too narrowly
            weights = {name: source.weight for name, source in self.sources.items()}
            self.train_loader = self._loader(
                StatefulLoader,
                self.train_dataset,
                self.batch_size,
                weights=weights,
                shuffle=self._shuffles(),
                batching=self.batching,
                batches_a_step=trainer.accumulate_grad_batches if trainer is not None else 1,
            )
            agree_on_sizes(self.train_loader, self.trainer)
            self.train_loader.progress = self._progress if self.trainer is not None else None
            self.train_loader.step_counts = self.step_counts
            if self._resume_state is not None:
                self.train_loader.load_state_dict(self._resume_state)
                self._resume_state = None
        return self.train_loader

    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        """Validation batches; an empty list where there are no validation rows."""
        return self._loader(RowLoader, self.val_dataset, self.eval_batch_size) if self.has_val() else []

    def test_dataloader(self) -> RowLoader:
        """Test batches."""
        return self._loader(RowLoader, self.test_dataset, self.eval_batch_size)

    def predict_dataloader(self) -> RowLoader:
        """Prompts, padded on the left."""
        return self._loader(RowLoader, self.predict_dataset, self.eval_batch_size)

    def row_counts(self) -> dict[str, int]:
        """Training rows of the epoch at hand, on this rank: rows = trained + skipped + not_reached; and its dropped_tokens."""
        return self.train_dataloader().row_counts()

    def source_counts(self) -> dict[str, dict[str, int]]:
        """The rows of `row_counts` by the name of their source."""
        return self.train_dataloader().source_counts()

    def media_counts(self) -> dict[Modality, int]:
        """Media in the training rows of the epoch at hand that were delivered so far, on this rank."""
        return self.train_dataloader().media_counts()

    def collate(self, examples: Sequence[Example], generate: bool = False) -> Batch:
        """A batch of examples made by hand, for prompts padded on the left."""
        return collate(examples, self._processor().pad_id, "left" if generate else "right")

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data, for checkpoints."""
        return {"train": self.train_loader.state_dict()} if self.train_loader is not None else {}

    @staticmethod
    def together(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The states of all processes as the one that a checkpoint holds."""
        return {name: StatefulLoader.together([state[name] for state in states]) for name in states[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the place that a checkpoint holds; a checkpoint that is only tested says nothing about training data.

        Raises:
            ValueError: It is a place in other data, or under other options.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        state = state_dict.get("train")
        if state is not None and self.train_loader is not None:
            self.train_loader.load_state_dict(state)
        else:
            self._resume_state = state

    def _processor(self) -> Processor:
        if self.processor is None:
            raise ValueError("the data module has no processor: run it through train.py, or pass processor=model.processor")
        return self.processor

    def _open(self, split: Split, rows: Rows | None = None) -> RowDataset:
        """The dataset of a split, tried out: what is wrong with it is said here as one paragraph, and not inside a worker."""
        dataset = self.dataset(split, rows)
        for source in dataset.sources:
            with contextlib.suppress(RowError):  # one of many rows: its loader names it
                source[0]
        return dataset

    def held_out_rows(self) -> tuple[Rows, Rows]:
        """Rows of training and validation of those sources where they share a file."""
        shares = {name: source.val_fraction for name, source in self.sources.items() if source.holds_out and source.train_path}
        if not shares:
            return {}, {}
        return hold_out_rows({name: self.source_dataset("train", name) for name in shares}, shares, self.seed)

    def _shuffles(self) -> bool:
        if self.shuffle and self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            log.warning("trainer.overfit_batches repeats the first batches of the training file: data.shuffle is off")
            return False
        return self.shuffle

    def _progress(self) -> Progress:
        # asked for, since the epoch that Lightning tells samplers by set_epoch is one too many after some resumes
        assert self.trainer is not None
        trainer: Any = self.trainer  # declared too narrowly
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return Progress(trainer.current_epoch, done, trainer.accumulate_grad_batches, trainer.num_training_batches)

    def _loader(self, kind: type[Loader], dataset: RowDataset, batch_size: int, **options: Any) -> Loader:
        trainer = self.trainer
        skipped_path = Path(trainer.default_root_dir) / "skipped.jsonl" if trainer is not None else None
        # the strategy's word: processes that share one model's tensors get the same rows
        replicas = trainer.distributed_sampler_kwargs if trainer is not None else None
        skipped = {
            source.name: SkippedRows(
                skipped_path, str(source.file.path), len(source), self.max_skipped, source.has_line, source.name
            )
            for source in dataset.sources
        }
        loader = kind(
            dataset,
            batch_size,
            skipped,
            seed=self.seed,
            num_workers=self.num_workers,
            rank=replicas["rank"] if replicas is not None else 0,
            world_size=replicas["num_replicas"] if replicas is not None else 1,
            media_cache=self.media_cache,
            **options,
        )
        self._loaders.append(loader)
        return loader
