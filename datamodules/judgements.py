"""What came of reward criteria in the batches of a loader: rows that were changed, and criteria that tell nothing apart."""

import logging
from collections.abc import Mapping
from pathlib import Path

from datamodules.batch import Batch
from datamodules.named_rows import RowFile
from datamodules.row_dataset import RowDataset
from datamodules.score_ranges import ENOUGH, ScoreRanges

log = logging.getLogger(__name__)


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
        self._ranges = ScoreRanges()

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
        self._ranges.add(answers["scores_A"], answers["roles"])
        self.report(ENOUGH)
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

    def report(self, at_least: int = 2) -> None:
        """Names the criteria that told nothing apart; see `ScoreRanges.constant`."""
        for said in self._ranges.constant(at_least):
            log.warning(said)
