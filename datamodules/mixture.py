"""Rows of several sources, mixed into one order."""

import re
from collections.abc import Mapping
from typing import Any

from datamodules.augment import Augment
from datamodules.batch import Modality
from datamodules.judged import JudgedDataModule
from datamodules.source import SPLITS, Source, source_option


class MixtureDataModule(JudgedDataModule):
    """Mixes the rows of several sources: images, video, sound and text, each with files, folder and prompt of its own.

    Batches are cut from one order in which the rows of all sources are mixed, so that a batch may hold rows of any of them.
    Validation and test take each row of each source once, spread evenly, so that trainer.limit_val_batches leaves a share of
    each, and measure by source as well.

    Args:
        sources: The sources by name. The names stand in `skipped.jsonl`, in predictions and in the names of metrics
            (`val/<name>/loss`). A single option of one has a flag: --data.sources.<name>.weight 0.5.
    """

    def __init__(self, sources: dict[str, Source], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not sources:
            raise ValueError("data.sources is empty: name at least one source, such as {web: {train_path: web.jsonl}}")
        for name, source in sources.items():
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"data.sources has the name {name!r}: a name is of letters, digits, _ and -, at least one")
            source.check(name)
            _check_paths(name, source, list(sources))
        self._sources = dict(sources)

    @property
    def sources(self) -> Mapping[str, Source]:
        """The sources by name."""
        return self._sources

    def augments(self, name: str) -> Mapping[Modality, Augment]:
        return self._sources[name].augment.by_modality()


def _check_paths(name: str, source: Source, names: list[str]) -> None:
    option = source_option(name)
    if all(source.path(split) is None for split in SPLITS):
        raise ValueError(
            f"{option} has no file: set {option}.train_path, val_path, test_path or predict_path. The sources are "
            f"{', '.join(names)}; a flag with another name begins a new one"
        )
    if source.train_path is None and (source.weight != 1 or source.val_fraction > 0):
        raise ValueError(
            f"{option} has no train_path, but a weight or a val_fraction, which take a part of the training rows: set "
            f"{option}.train_path, or leave the others out"
        )
