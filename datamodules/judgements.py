"""What came of reward criteria in the batches of a loader: rows that were changed, and criteria that tell nothing apart."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from datamodules.batch import Batch
from datamodules.named_rows import RowFile
from datamodules.row_dataset import RowDataset

log = logging.getLogger(__name__)

ENOUGH = 200
"""Answers after which a criterion that gave the same to each is reported in the middle of an epoch."""


@dataclass
class _Seen:
    answers: int = 0
    scored: int = 0
    lowest: float = float("inf")
    highest: float = -float("inf")


class Judgements:
    """Keeps account of what reward criteria did.

    Args:
        path: The file of the changed rows, in the run folder; None: only count.
        dataset: The rows.
    """

    def __init__(self, path: Path | None, dataset: RowDataset) -> None:
        self.path = path
        self._files: Mapping[str, RowFile] = {
            source.name: RowFile(path, "changed rows", str(source.file.path), source.name) for source in dataset.sources
        }
        self._seen: dict[str, _Seen] = {}
        self._reported: set[str] = set()

    @property
    def num_changed(self) -> int:
        """Rows of the data that were changed so far, by any process, also before a resume."""
        return sum(len(file.lines()) for file in self._files.values())

    def add(self, batch: Batch) -> None:
        """Takes account of a batch.

        Raises:
            ValueError: The file of the changed rows cannot be written.
        """
        answers = batch.get("answers")
        if answers is None or "scores_A" not in answers:
            return
        for name, scores_A in answers["scores_A"].items():
            # those of the row's own answers: the others were not scored
            is_own_A = torch.tensor([role not in ("corrupted", "mismatched") for role in answers["roles"]])
            given = scores_A[is_own_A & ~scores_A.isnan()].tolist()
            seen = self._seen.setdefault(name, _Seen())
            seen.answers += int(is_own_A.sum())
            seen.scored += len(given)
            seen.lowest, seen.highest = min([seen.lowest, *given]), max([seen.highest, *given])
        new = [
            change
            for name, file in self._files.items()
            for change in file.name([change for change in answers["changes"] if change.origin.source == name])[0]
        ]
        if new:
            where = f", see {self.path}" if self.path is not None else ""
            log.warning(
                "reward criteria changed %d row(s), %d so far%s; the last: %s: %s",
                len(new),
                self.num_changed,
                where,
                new[-1].origin,
                new[-1].reason,
            )
        self.report(ENOUGH)

    def report(self, at_least: int = 2) -> None:
        """Names each criterion, once, that gave the same to all of at least so many answers."""
        for name, seen in self._seen.items():
            if name in self._reported or seen.answers < at_least or seen.lowest < seen.highest:
                continue
            self._reported.add(name)
            what = "no score" if not seen.scored else f"the score {seen.lowest:.3g}"
            log.warning(
                "the reward criterion %s gave %s to each of %d answers: it tells nothing apart",
                name,
                what,
                seen.scored or seen.answers,
            )
