"""What remains of rows and media when they were read."""

from dataclasses import dataclass

from datamodules.batch import Modality, Origin
from datamodules.dataset import MultiModalDataset
from datamodules.jsonl import JsonlFile
from datamodules.source import Split
from inspection.excess import Excess
from inspection.fingerprints import Fingerprint
from inspection.measures import Measures
from inspection.texts import RowText


@dataclass(frozen=True)
class Part:
    """The rows of one file in one split.

    Args:
        split: The split.
        dataset: The rows, as training reads them.
    """

    split: Split
    dataset: MultiModalDataset

    @property
    def source(self) -> str:
        """The name of the source in a mixture; empty: there is one alone."""
        return self.dataset.name

    @property
    def file(self) -> JsonlFile:
        """The file."""
        return self.dataset.file

    @property
    def name(self) -> str:
        """Split and source, in words."""
        return f"{self.source}/{self.split}" if self.source else self.split

    def origin(self, row: int) -> Origin:
        """File and line of a row."""
        return self.file.origin(self.dataset.rows[row])


@dataclass(frozen=True, slots=True)
class MediumRecord:
    """What remains of a medium.

    Args:
        modality: Its kind.
        name: As the row names it.
        file: The same for two media that are the same part of the same file.
        shape: Of the decoded medium: (H, W), (F, H, W) or (S,).
        seconds: Length of a sound; 0 otherwise.
        measures: Whether it is of use.
        fingerprint: What it is known by.
        score: How well it fits its text, in [0, 1]; None: nobody can tell.
    """

    modality: Modality
    name: str
    file: bytes
    shape: tuple[int, ...]
    seconds: float
    measures: Measures
    fingerprint: Fingerprint
    score: float | None = None


@dataclass(frozen=True, slots=True)
class RowRecord:
    """What remains of a row.

    Args:
        part: The number of its part.
        row: Its number there.
        problem: Why it cannot be used; empty: it can.
        is_too_long: Whether that is its length alone.
        num_tokens: Its text, image, video and audio tokens, before anything is cut, of several conversations those of the
            longest; empty where it cannot be used for another reason than its length.
        num_dropped: Tokens that are cut.
        media: Its media; empty where one of them cannot be read.
        text: What it says; None where it cannot be read.
        excess: Media that were refused for their size.
    """

    part: int
    row: int
    problem: str = ""
    is_too_long: bool = False
    num_tokens: tuple[int, ...] = ()
    num_dropped: int = 0
    media: tuple[MediumRecord, ...] = ()
    text: RowText | None = None
    excess: tuple[Excess, ...] = ()
