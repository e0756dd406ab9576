"""Rows of a JSONL file as examples: media found, decoded, augmented and put through the model's processor."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from datamodules.augment import Augment, rng
from datamodules.batch import MODALITIES, Example, Modality, RowError
from datamodules.content import Media
from datamodules.conversation import Sample, parse_row
from datamodules.jsonl import JsonlFile
from datamodules.media import Decoded, MediaLimits, decode
from datamodules.processor import Processor
from datamodules.prompt_template import PromptTemplate
from datamodules.sources import MediaError, MediaRoot, content_key


class RowKey(NamedTuple):
    """A row in an epoch: what an example, augmentation included, is a pure function of."""

    row: int
    epoch: int


class MultiModalDataset(Dataset[Example]):
    """The rows of one JSONL file.

    `dataset[i]` is the example of row i, or raises a `RowError` that names file, line and reason. A loader asks for
    whole batches (`__getitems__`) and gets such errors beside the examples, so that one bad row costs one row.

    Args:
        data_path: The JSONL file.
        media_root: Folder below which the rows' media lie.
        processor: The model's own; turns samples into examples.
        prompt_template: For flat rows, for example "Question: {question}".
        modality: The modality of a single `augment`.
        augment: Random augmentation for training, of `modality` or of each modality; None: none.
        seed: Seed of the augmentation.
        rows: Which rows of the file belong to the dataset, in the order of the file; None: all.
        generate: Examples end where the answer begins, and rows need no answer.
        limits: How big media may be, before they are decoded.

    Raises:
        ValueError: The file, the media root or the prompt template cannot be used.
    """

    def __init__(
        self,
        data_path: str,
        media_root: str,
        processor: Processor,
        prompt_template: str | None = None,
        modality: Modality = "image",
        augment: Augment | Mapping[Modality, Augment] | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        generate: bool = False,
        limits: MediaLimits = MediaLimits(),  # it is frozen
    ) -> None:
        if prompt_template is not None:
            PromptTemplate(prompt_template)  # what is wrong with it is said here, once, and not in a worker
        self.file = JsonlFile(data_path)
        self.media_root = MediaRoot(Path(media_root))
        self.processor = processor
        self.prompt_template = prompt_template
        augments = augment if isinstance(augment, Mapping) else {} if augment is None else {modality: augment}
        self.augment = {modality: change for modality, change in augments.items() if change.is_random}
        self.seed = seed
        self.rows = rows if rows is not None else range(len(self.file))
        self.generate = generate
        self.limits = limits

    def __len__(self) -> int:
        return len(self.rows)

    def has_line(self, line: int) -> bool:
        """Whether a line of the file, counted from 1, is one of these rows."""
        row = bisect_left(self.rows, line, key=self._line)
        return row < len(self.rows) and self._line(self.rows[row]) == line

    def _line(self, row: int) -> int:
        return self.file.origin(row).line

    def sample(self, row: int) -> Sample:
        """Row number `row` as a sample, without its media.

        Raises:
            RowError: The row is malformed.
        """
        line = self.rows[row]
        return parse_row(
            self.file[line], self.file.origin(line), prompt_template=self.prompt_template, require_answer=not self.generate
        )

    def decode(self, sample: Sample, key: RowKey | None = None) -> dict[Modality, list[tuple[str, Decoded]]]:
        """Decoded media of a sample by modality, each with a key of its content.

        Args:
            sample: The row.
            key: The row in an epoch, from which random augmentation is drawn; None: without augmentation.

        Raises:
            RowError: A medium is missing, corrupt, or over a limit; or the model takes none of its kind.
        """
        self.processor.check_media(sample)
        return {
            modality: [self._decode(medium, sample, key, place) for place, medium in enumerate(sample.media(modality))]
            for modality in MODALITIES
            if sample.media(modality)
        }

    def _decode(self, medium: Media, sample: Sample, key: RowKey | None, place: int) -> tuple[str, Decoded]:
        augment = self.augment.get(medium.modality)
        generator = None if augment is None or key is None else rng(self.seed, key.epoch, self.rows[key.row], place)
        transform = self.processor.encoders[medium.modality].transform
        try:
            content = content_key(medium.source, self.media_root)
            decoded = decode(medium, self.media_root, self.limits, transform, generator)
        except MediaError as error:
            raise RowError(sample.origin, str(error)) from error
        if augment is None or key is None or generator is None:
            return content, decoded
        return f"{content}@{key.epoch}.{key.row}.{place}", augment(decoded, generator)

    def __getitem__(self, key: int | RowKey) -> Example:
        key = key if isinstance(key, RowKey) else RowKey(key, 0)
        sample = self.sample(key.row)
        return self.processor(sample, self.decode(sample, key), generate=self.generate)

    def __getitems__(self, keys: Sequence[int | RowKey]) -> list[Example | RowError]:
        items: list[Example | RowError] = []
        for key in keys:
            try:
                items.append(self[key])
            except RowError as error:
                items.append(error)
        return items
