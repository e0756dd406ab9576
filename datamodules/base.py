"""What the data modules of the modalities share: one source of rows, a JSONL file a split."""

from collections.abc import Mapping
from typing import Any

from datamodules.augment import Augment
from datamodules.batch import Modality
from datamodules.judged import JudgedDataModule
from datamodules.media import MediaLimits
from datamodules.source import Source


class MultiModalDataModule(JudgedDataModule):
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
        limits: How big media may be, before they are decoded.

    Attributes:
        augment: Random augmentation of training media, by modality.
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
        limits: MediaLimits = MediaLimits(),  # it is frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = Source(
            train_path, val_path, test_path, predict_path, media_root, prompt_template, val_fraction, limits=limits
        )
        self.source.check()
        self.augment: dict[Modality, Augment] = {}

    @property
    def sources(self) -> Mapping[str, Source]:
        """The one source, without a name."""
        return {"": self.source}

    def augments(self, name: str) -> Mapping[Modality, Augment]:
        return self.augment
