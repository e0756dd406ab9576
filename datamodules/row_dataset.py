"""Rows as examples: what every dataset of them can do."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch.utils.data import Dataset

from datamodules.batch import Example, Modality, RowError
from datamodules.conversation import Sample
from datamodules.media import Decoded
from datamodules.packing import RowSize
from datamodules.processor import Processor

if TYPE_CHECKING:
    from datamodules.dataset import MultiModalDataset


class RowKey(NamedTuple):
    """A row, and how often it has come before: what an example, augmentation included, is a pure function of.

    The second is the epoch, where each epoch has each row once; in a mixture it is the pass over the rows of the source.
    The third, where rows are packed, says which of them share a row of the batch; the example does not depend on it.
    """

    row: int
    epoch: int
    slot: int | None = None


class RowDataset(Dataset[Example]):
    """Rows as examples, from one file or several.

    `dataset[i]` is the example of row i, or raises a `RowError` that names file, line and reason. A loader asks for
    whole batches (`__getitems__`) and gets such errors beside the examples, so that one bad row costs one row.

    Attributes:
        processor: The model's own; turns samples into examples.
        generate: Whether examples end where the answer begins.
    """

    processor: Processor
    generate: bool

    @property
    @abstractmethod
    def sources(self) -> "Sequence[MultiModalDataset]":
        """The files that the rows come from, in the order of the rows."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def __getitem__(self, key: int | RowKey) -> Example:
        """The example of a row.

        Raises:
            RowError: The row cannot be used.
        """

    @abstractmethod
    def sample(self, row: int) -> Sample:
        """Row number `row` as a sample, without its media.

        Raises:
            RowError: The row is malformed.
        """

    @abstractmethod
    def num_tokens(self, row: int) -> int:
        """Length of the example of a row, without augmentation, from its text and the headers of its media alone.

        Where answers are compared it is that of all of them, each with a prompt of its own.

        Raises:
            RowError: The row cannot be used.
        """

    @abstractmethod
    def size(self, row: int) -> RowSize:
        """How much of a batch a row takes; see `num_tokens`, but answers that are compared share what they share in a batch.

        Raises:
            RowError: The row cannot be used.
        """

    @abstractmethod
    def decode(self, sample: Sample, key: RowKey | None = None) -> dict[Modality, list[tuple[str, Decoded]]]:
        """Decoded media of a sample by modality, each with a key of its content.

        Args:
            sample: The row.
            key: The row in an epoch, from which random augmentation is drawn; None: without augmentation.

        Raises:
            RowError: A medium is missing, corrupt, or over a limit; or the model takes none of its kind.
        """

    def __getitems__(self, keys: Sequence[int | RowKey]) -> list[Example | RowError]:
        items: list[Example | RowError] = []
        for key in keys:
            try:
                example = self[key]
            except RowError as error:
                items.append(error)
                continue
            if isinstance(key, RowKey):
                example.slot = key.slot
            items.append(example)
        return items

    def in_turn(self) -> Iterator[int]:
        """Row numbers, one of each source in turn: the first few are a look at all of them."""
        sizes = [len(source) for source in self.sources]
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        for place in range(max(sizes)):
            yield from (start + place for start, size in zip(starts, sizes, strict=True) if place < size)
