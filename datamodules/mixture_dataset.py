"""Rows of several JSONL files as one dataset."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from datamodules.batch import Example, Modality
from datamodules.conversation import Sample
from datamodules.dataset import MultiModalDataset
from datamodules.media import Decoded
from datamodules.packing import RowSize
from datamodules.row_dataset import RowDataset, RowKey


class MixtureDataset(RowDataset):
    """The rows of several sources, one source after the other.

    Args:
        sources: One a source, each with a name of its own; all of them with the same processor.
    """

    def __init__(self, sources: Sequence[MultiModalDataset]) -> None:
        self._sources = tuple(sources)
        self._ends = list(accumulate(map(len, sources)))
        self._by_name = {source.name: source for source in sources}
        self.processor = sources[0].processor
        self.generate = sources[0].generate

    @property
    def sources(self) -> Sequence[MultiModalDataset]:
        """The sources, in the order of the rows."""
        return self._sources

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, key: int | RowKey) -> Example:
        key = key if isinstance(key, RowKey) else RowKey(key, 0)
        source, own_row = self._find(key.row)
        return source[key._replace(row=own_row)]

    def sample(self, row: int) -> Sample:
        source, own_row = self._find(row)
        return source.sample(own_row)

    def num_tokens(self, row: int) -> int:
        source, own_row = self._find(row)
        return source.num_tokens(own_row)

    def size(self, row: int) -> RowSize:
        source, own_row = self._find(row)
        return source.size(own_row)

    def decode(self, sample: Sample, key: RowKey | None = None) -> dict[Modality, list[tuple[str, Decoded]]]:
        own_key = None if key is None else key._replace(row=self._find(key.row)[1])
        return self._by_name[sample.origin.source].decode(sample, own_key)

    def _find(self, row: int) -> tuple[MultiModalDataset, int]:
        """The source of a row, and its number there."""
        if not 0 <= row < len(self):
            raise IndexError(f"the sources have rows 0 to {len(self) - 1}, got {row}")
        place = bisect_right(self._ends, row)
        return self._sources[place], row - (self._ends[place] - len(self._sources[place]))
