"""A source of rows: its files, how they are read, and how much of it an epoch takes."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.answer_form import AnswerForm
from datamodules.augment import Augment, ImageAugment
from datamodules.augment_audio import AudioAugment
from datamodules.augment_video import VideoAugment
from datamodules.batch import Modality
from datamodules.dataset import MultiModalDataset
from datamodules.media import MediaLimits
from datamodules.processor import Processor

Split = Literal["train", "val", "test", "predict"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "predict")


@dataclass(frozen=True)
class MediaAugment:
    """Random changes of training media, by modality.

    Args:
        image: Of images; None: none.
        video: Of clips.
        audio: Of sounds.
    """

    image: ImageAugment | None = None
    video: VideoAugment | None = None
    audio: AudioAugment | None = None

    def by_modality(self) -> dict[Modality, Augment]:
        """Those that there are."""
        augments: dict[Modality, Augment | None] = {"image": self.image, "video": self.video, "audio": self.audio}
        return {modality: augment for modality, augment in augments.items() if augment is not None}


@dataclass(frozen=True)
class Source:
    """Rows of one kind: JSONL files, one a split, and how they are read.

    Args:
        train_path: JSONL file of the training rows; None: nothing of this source is trained on.
        val_path: JSONL file of the validation rows; without it, `val_fraction` of the training file.
        test_path: JSONL file of the test rows.
        predict_path: JSONL file of rows to answer; they need no answer.
        media_root: Folder below which the rows' media lie; None: the folder of the split's file.
        prompt_template: The prompt of flat rows, with their columns in braces: "Question: {question}".
        val_fraction: Share of the training rows that is held out for validation where there is no `val_path`. Rows that
            share a medium, also with rows of other sources that hold some out, stay on one side.
        weight: How often an epoch passes over the training rows. 1: each row once; 2: each twice, differently augmented;
            0.25: a quarter of them, and another quarter in the next epoch, until all have had their turn.
        augment: Random changes of training media.
        limits: How big media may be, before they are decoded.
    """

    train_path: str | None = None
    val_path: str | None = None
    test_path: str | None = None
    predict_path: str | None = None
    media_root: str | None = None
    prompt_template: str | None = None
    val_fraction: float = 0.0
    weight: float = 1.0
    augment: MediaAugment = MediaAugment()
    limits: MediaLimits = MediaLimits()

    def check(self, name: str = "") -> None:
        """Checks the numbers; a source alone does not know by what option they were set.

        Args:
            name: The name of the source in a mixture.

        Raises:
            ValueError: One of them is out of its range.
        """
        option, share, passes = source_option(name), self.val_fraction, self.weight
        check_option(f"{option}.val_fraction", share, "a share of the training rows, in [0, 1)", 0 <= share < 1)
        expected = "a number of passes over the training rows an epoch, above 0 (to do without a source, leave it out)"
        check_option(f"{option}.weight", passes, expected, 0 < passes < math.inf)

    @property
    def holds_out(self) -> bool:
        """Whether its validation rows are part of the training file."""
        return self.val_path is None and self.val_fraction > 0

    def path_option(self, split: Split) -> str:
        """The option that names the file of a split: validation may be held out of the training file."""
        return "train_path" if split == "val" and self.holds_out else f"{split}_path"

    def path(self, split: Split) -> str | None:
        """The file of a split; None: the source has no part in it."""
        paths = {
            "train_path": self.train_path,
            "val_path": self.val_path,
            "test_path": self.test_path,
            "predict_path": self.predict_path,
        }
        return paths[self.path_option(split)]

    def dataset(
        self,
        split: Split,
        processor: Processor,
        augment: Mapping[Modality, Augment] | None = None,
        name: str = "",
        seed: int = 0,
        rows: Sequence[int] | None = None,
        answer_form: AnswerForm = AnswerForm(),  # it is frozen
    ) -> MultiModalDataset:
        """The rows of a split.

        Args:
            split: One that the source has a file for.
            processor: The model's own.
            augment: Random augmentation; None: none.
            name: The name of the source in a mixture.
            seed: Seed of the run.
            rows: Which rows of the file; None: all.
            answer_form: Which answers of a row an example has.

        Raises:
            ValueError: The file, the media root or the prompt template cannot be used.
        """
        path = self.path(split)
        assert path is not None, f"{name} has no {split} rows"
        return MultiModalDataset(
            path,
            self.media_root if self.media_root is not None else str(Path(path).parent),
            processor,
            prompt_template=self.prompt_template,
            augment=augment,
            seed=_own_seed(seed, name),
            rows=rows,
            generate=split == "predict",
            limits=self.limits,
            name=name,
            answer_form=answer_form,
        )


def names_with_rows(sources: Mapping[str, Source], split: Split) -> list[str]:
    """The names of the sources that have rows in a split.

    Args:
        sources: By name.
        split: Which one.

    Raises:
        ValueError: None of them has.
    """
    names = [name for name, source in sources.items() if source.path(split) is not None]
    if not names:
        if "" in sources:
            option = sources[""].path_option(split)
            held_out = ", or data.val_fraction to hold some of the training rows out" if split == "val" else ""
            raise ValueError(f"data.{option} is not set: give the JSONL file of the {split} rows{held_out}")
        held_out = ", or a val_fraction to hold some of its training rows out" if split == "val" else ""
        raise ValueError(
            f"none of the sources {', '.join(sources)} has {split} rows: give one of them the JSONL file of its rows, "
            f"with data.sources.<name>.{split}_path{held_out}"
        )
    return names


def source_option(name: str) -> str:
    """What a source is called on the command line."""
    return f"data.sources.{name}" if name else "data"


def check_option(option: str, value: float, expected: str, is_valid: bool) -> None:
    """Refuses a value of an option.

    Raises:
        ValueError: It is not valid.
    """
    if not is_valid:
        raise ValueError(f"{option} is {expected}, got {value}")


def _own_seed(seed: int, name: str) -> int:
    """A seed for each source, which stays the same when others come or go; that of the run where there is one source."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") if name else seed
