"""The LightningDataModule that the modalities share: files, splits, loaders, and the place in the epoch."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.augment import Augment
from datamodules.batch import MODALITIES, Batch, Example, Modality, RowError
from datamodules.collate import collate
from datamodules.dataset import MultiModalDataset
from datamodules.jsonl import JsonlFile
from datamodules.loader import Progress, RowLoader, StatefulLoader
from datamodules.media import MediaLimits
from datamodules.processor import Processor
from datamodules.skipped import SkippedRows
from datamodules.split import hold_out

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test", "predict"]
Loader = TypeVar("Loader", bound=RowLoader)


class MultiModalDataModule(L.LightningDataModule):
    """Loaders over JSONL files, one a split.

    Args:
        train_path: JSONL file of the training rows.
        val_path: JSONL file of the validation rows; without it, `val_fraction` of the training file.
        test_path: JSONL file of the test rows.
        predict_path: JSONL file of rows to answer; they need no answer.
        media_root: Folder below which the rows' media lie; None: the folder of the split's file.
        prompt_template: The prompt of flat rows, with their columns in braces: "Question: {question}".
        val_fraction: Share of the training rows that is held out for validation where there is no `val_path`. Rows that
            share a medium stay on one side. To find them, each process reads the file once when a run starts (about 80
            seconds for 1,000,000 rows): write a file of validation rows where that is too long.
        batch_size: Rows a training batch, on each device.
        eval_batch_size: Rows a batch elsewhere; None: as in training.
        num_workers: Processes that read and decode, on each device; 0: none of their own.
        shuffle: Train in a new order each epoch; False: in the order of the file.
        max_skipped: Share of the rows of a split that may be skipped (bad media, too long, malformed) before the run stops,
            rounded down; one row may be in any case, however few there are, unless this is 0.
        seed: Seed of the order of the rows, of the split and of the augmentation.
        limits: How big media may be, before they are decoded.
        processor: Comes from the model; not set by hand.
    """

    def __init__(
        self,
        train_path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        predict_path: str | None = None,
        media_root: str | None = None,
        prompt_template: str | None = None,
        val_fraction: float = 0.0,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        shuffle: bool = True,
        max_skipped: float = 0.01,
        seed: int = 0,
        limits: MediaLimits = MediaLimits(),  # it is frozen
        processor: Processor | None = None,
    ) -> None:
        super().__init__()
        _check("val_fraction", val_fraction, "a share of the training rows, in [0, 1)", 0 <= val_fraction < 1)
        _check("max_skipped", max_skipped, "a share of the rows, in [0, 1]", 0 <= max_skipped <= 1)
        _check("batch_size", batch_size, "a number of rows, at least 1", batch_size >= 1)
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        _check("eval_batch_size", eval_batch_size, "a number of rows, at least 1", eval_batch_size >= 1)
        _check("num_workers", num_workers, "a number of processes, 0 or more (0: none of their own)", num_workers >= 0)
        _check("seed", seed, "a whole number in [0, 2^32)", 0 <= seed < 2**32)
        self.paths: dict[Split, str | None] = {"train": train_path, "val": val_path, "test": test_path, "predict": predict_path}
        self.media_root = media_root
        self.prompt_template = prompt_template
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.shuffle = shuffle
        self.max_skipped = max_skipped
        self.seed = seed
        self.limits = limits
        self.processor = processor
        self.augment: dict[Modality, Augment] = {}
        self.train_loader: StatefulLoader | None = None
        self._resume_state: dict[str, Any] | None = None
        self._loaders: list[RowLoader] = []

    def dataset(self, split: Split, rows: Sequence[int] | None = None) -> MultiModalDataset:
        """The dataset of a split, augmented where it trains.

        Args:
            split: Which one.
            rows: Which rows of its file; None: all.

        Raises:
            ValueError: The split has no file, or its file, the media root or the prompt template cannot be used.
        """
        path = self.path(split)
        return MultiModalDataset(
            path,
            self.media_root if self.media_root is not None else str(Path(path).parent),
            self._processor(),
            prompt_template=self.prompt_template,
            augment=self.augment if split == "train" else None,
            seed=self.seed,
            rows=rows,
            generate=split == "predict",
            limits=self.limits,
        )

    def path(self, split: Split) -> str:
        """The file of a split: validation may be held out of the training file.

        Raises:
            ValueError: There is none.
        """
        held_out = split == "val" and self.paths["val"] is None and self.val_fraction > 0
        path = self.paths["train" if held_out else split]
        if path is None:
            other = ", or data.val_fraction to hold some of the training rows out" if split == "val" else ""
            raise ValueError(f"data.{split}_path is not set: give the JSONL file of the {split} rows{other}")
        return path

    def has_val(self) -> bool:
        """Whether there are validation rows."""
        return self.paths["val"] is not None or self.val_fraction > 0

    def setup(self, stage: str) -> None:
        """Opens the files that `stage` needs.

        Raises:
            ValueError: One of them, or an option, cannot be used.
        """
        if stage == "fit":
            self.train_loader = None
            train_rows, val_rows = self._held_out()
            self.train_dataset = self._open("train", train_rows)
            if self.has_val():
                self.val_dataset = self._open("val", val_rows)
        elif stage == "validate":
            self.val_dataset = self._open("val", self._held_out()[1])
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
        for loader in self._loaders:
            loader.stop_workers()

    def train_dataloader(self) -> StatefulLoader:
        """Training batches; made once for each fit, and it goes on where a resumed run stopped."""
        if self.train_loader is None:
            self.train_loader = self._loader(StatefulLoader, self.train_dataset, self.batch_size, shuffle=self._shuffles())
            self.train_loader.progress = self._progress if self.trainer is not None else None
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

    def media_counts(self) -> dict[Modality, int]:
        """Media in the training rows of the epoch at hand that were delivered so far, on this rank."""
        return self.train_dataloader().media_counts()

    def collate(self, examples: Sequence[Example], generate: bool = False) -> Batch:
        """A batch of examples made by hand, for prompts padded on the left."""
        return collate(examples, self._processor().pad_id, "left" if generate else "right")

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data, for checkpoints."""
        return {"train": self.train_loader.state_dict()} if self.train_loader is not None else {}

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

    def _open(self, split: Split, rows: Sequence[int] | None = None) -> MultiModalDataset:
        """The dataset of a split, tried out: what is wrong with it is said here as one paragraph, and not inside a worker."""
        path = self.path(split)
        option = split if path == self.paths[split] else "train"
        try:
            JsonlFile(path)
        except ValueError as error:
            raise ValueError(f"data.{option}_path: {error}") from error
        dataset = self.dataset(split, rows)
        with contextlib.suppress(RowError):  # one of many rows: its loader names it
            dataset[0]
        return dataset

    def _held_out(self) -> tuple[list[int] | None, list[int] | None]:
        """Row numbers of training and validation where they share the training file; None: all of a file of their own."""
        if self.paths["val"] is not None or self.val_fraction == 0:
            return None, None
        whole = self._open("train")
        train_rows, val_rows = hold_out(_media_of_rows(whole), self.val_fraction, self.seed)
        if not train_rows:
            raise ValueError(
                f"data.val_fraction = {self.val_fraction} leaves no training row of the {len(val_rows)} in {whole.file.path}, "
                "since all of them share media: give the validation rows a file of their own with data.val_path"
            )
        return train_rows, val_rows

    def _shuffles(self) -> bool:
        if self.shuffle and self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            log.warning("trainer.overfit_batches repeats the first batches of the training file: data.shuffle is off")
            return False
        return self.shuffle

    def _progress(self) -> Progress:
        # asked for, since the epoch that Lightning tells samplers by set_epoch is one too many after some resumes
        assert self.trainer is not None
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return Progress(self.trainer.current_epoch, total.processed)  # type: ignore[attr-defined]  # declared too narrowly

    def _loader(self, kind: type[Loader], dataset: MultiModalDataset, batch_size: int, shuffle: bool = False) -> Loader:
        trainer = self.trainer
        skipped_path = Path(trainer.default_root_dir) / "skipped.jsonl" if trainer is not None else None
        # the strategy's word: processes that share one model's tensors get the same rows
        replicas = trainer.distributed_sampler_kwargs if trainer is not None else None
        loader = kind(
            dataset,
            batch_size,
            SkippedRows(skipped_path, str(dataset.file.path), len(dataset), self.max_skipped, dataset.has_line),
            shuffle=shuffle,
            seed=self.seed,
            num_workers=self.num_workers,
            rank=replicas["rank"] if replicas is not None else 0,
            world_size=replicas["num_replicas"] if replicas is not None else 1,
        )
        self._loaders.append(loader)
        return loader


def _media_of_rows(dataset: MultiModalDataset) -> Iterator[list[str]]:
    """The sources of each row's media; none for a row that cannot be used."""
    for row in range(len(dataset)):
        try:
            sample = dataset.sample(row)
        except RowError:  # its loader names it
            yield []
        else:
            yield [medium.source for modality in MODALITIES for medium in sample.media(modality)]


def _check(option: str, value: float, expected: str, is_valid: bool) -> None:
    if not is_valid:
        raise ValueError(f"data.{option} is {expected}, got {value}")
