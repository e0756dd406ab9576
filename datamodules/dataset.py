"""Rows of a JSONL file as examples: media found, decoded, augmented and put through the model's processor."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from datamodules.answer_examples import answer_example
from datamodules.answer_form import AnswerForm
from datamodules.answer_rows import AnswerExample
from datamodules.answers import Candidates, parse_answers
from datamodules.augment import Augment, rng
from datamodules.batch import MODALITIES, Example, Modality, Origin, RowError
from datamodules.cache import CacheOptions
from datamodules.cache_keys import media_settings
from datamodules.cached_media import CachedMedia
from datamodules.content import Media
from datamodules.conversation import Sample, parse_row
from datamodules.corrupted import corrupt_medium
from datamodules.jsonl import JsonlFile
from datamodules.judge import Judge
from datamodules.media import Decoded, MediaLimits, decode, media_key, probe
from datamodules.packing import RowSize
from datamodules.parts import Prepared, media_shape
from datamodules.processor import Processor
from datamodules.prompt_template import PromptTemplate
from datamodules.row_dataset import RowDataset, RowKey
from datamodules.row_sizes import row_size
from datamodules.rows import Row, UnusableRowError
from datamodules.sampled_answers import preference_form
from datamodules.sources import MediaError, MediaRoot

log = logging.getLogger(__name__)

Taken = TypeVar("Taken")


class MultiModalDataset(RowDataset):
    """The rows of one JSONL file.

    Args:
        data_path: The JSONL file.
        media_root: Folder below which the rows' media lie.
        processor: The model's own; turns samples into examples.
        prompt_template: For flat rows, for example "Question: {question}".
        modality: The modality of a single `augment`.
        augment: Random augmentation for training, of `modality` or of each modality; None: none.
        seed: Seed of the augmentation; in a mixture also of which rows come first.
        rows: Which rows of the file belong to the dataset, in the order of the file; None: all.
        generate: Examples end where the answer begins, and rows need no answer.
        limits: How big media may be, before they are decoded.
        name: The name of these rows in a mixture.
        answer_form: Which answers of a row an example has; not where `generate`.

    Attributes:
        judge: What reward criteria do with the answers of a row; None: there are none.

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
        name: str = "",
        answer_form: AnswerForm = AnswerForm(),  # it is frozen
    ) -> None:
        if prompt_template is not None:
            PromptTemplate(prompt_template)  # what is wrong with it is said here, once, and not in a worker
        self.name = name
        self.file = JsonlFile(data_path, name)
        self.media_root = MediaRoot(Path(media_root))
        self.processor = processor
        self.prompt_template = prompt_template
        augments = augment if isinstance(augment, Mapping) else {} if augment is None else {modality: augment}
        self.augment = {modality: change for modality, change in augments.items() if change.is_random}
        self.seed = seed
        self.rows = rows if rows is not None else range(len(self.file))
        self.generate = generate and not answer_form.scores_answers
        self.limits = limits
        self.cached: CachedMedia | None = None
        self.answer_form = AnswerForm() if generate else answer_form
        self.judge: Judge | None = None

    @property
    def sources(self) -> "Sequence[MultiModalDataset]":
        """Itself."""
        return (self,)

    def __len__(self) -> int:
        return len(self.rows)

    def row_of(self, line: int) -> int | None:
        """The number of the row that stands in a line of the file, counted from 1; None: it is none of these rows."""
        row = bisect_left(self.rows, line, key=self._line)
        return row if row < len(self.rows) and self._line(self.rows[row]) == line else None

    def has_line(self, line: int) -> bool:
        """Whether a line of the file, counted from 1, is one of these rows."""
        return self.row_of(line) is not None

    def _line(self, row: int) -> int:
        return self.file.origin(row).line

    def sample(self, row: int) -> Sample:
        fields, origin = self._row(row)
        return parse_row(fields, origin, prompt_template=self.prompt_template, require_answer=not self.generate)

    def _row(self, row: int) -> tuple[Row, Origin]:
        """A row of the file, and where it stands; answers of which a pair is to be made stand where those of pairs do."""
        line = self.rows[row]
        fields, origin = self.file[line], self.file.origin(line)
        if self.judge is None or not self.judge.builds:
            return fields, origin
        try:
            return preference_form(fields, self.prompt_template), origin
        except UnusableRowError as error:
            raise RowError(origin, str(error)) from error

    def candidates(self, row: int) -> Candidates:
        """The answers of row number `row` that the objective compares, without their media.

        Raises:
            RowError: The row is malformed, or has no such answers.
        """
        assert self.answer_form.kind != "single", "the objective compares no answers"
        return parse_answers(*self._row(row), self.answer_form.kind, self.prompt_template)

    def samples(self, row: int) -> list[Sample]:
        """The conversations of row number `row`: of each answer that is compared, else the one.

        Raises:
            RowError: The row is malformed.
        """
        if self.answer_form.kind == "single":
            return [self.sample(row)]
        return [answer.sample for answer in self.candidates(row).answers]

    def num_tokens(self, row: int) -> int:
        return sum(self.lengths(row))

    def lengths(self, row: int) -> list[int]:
        """The length of each answer that is compared, with a prompt of its own.

        Raises:
            RowError: The row cannot be used.
        """
        return list(map(self._length, self.samples(row)))

    def _length(self, sample: Sample) -> int:
        self.processor.check_media(sample)
        num_tokens = {
            modality: [self.processor.num_tokens(modality, self.shape(medium, sample)) for medium in sample.media(modality)]
            for modality in MODALITIES
        }
        return len(self.processor.encode(sample, num_tokens, self.generate).tokens)

    def shape(self, medium: Media, sample: Sample) -> tuple[int, ...]:
        """Shape of a medium of a sample, decoded, from its header alone.

        Raises:
            RowError: It cannot be used.
        """
        try:
            return probe(medium, self.media_root, self.limits, self.processor.encoders[medium.modality].transform)
        except MediaError as error:
            raise RowError(sample.origin, str(error)) from error

    def size(self, row: int) -> RowSize:
        return row_size(self, row)

    def decode(self, sample: Sample, key: RowKey | None = None) -> dict[Modality, list[tuple[str, Decoded]]]:
        return self._each_medium(sample, lambda medium, place: self.decode_medium(medium, sample, key, place))

    def decode_corrupted(self, sample: Sample, key: RowKey) -> dict[Modality, list[tuple[str, Decoded]]]:
        """As `decode`, and then corrupted as the objective wants it."""

        def corrupt(medium: Media, place: int) -> tuple[str, Decoded]:
            found = self.decode_medium(medium, sample, key, place)
            return corrupt_medium(self, medium, found, sample, key.row, place)

        return self._each_medium(sample, corrupt)

    def _each_medium(self, sample: Sample, take: Callable[[Media, int], Taken]) -> dict[Modality, list[Taken]]:
        """What `take` makes of each medium of a sample and its place, by modality; the model must take such media."""
        self.processor.check_media(sample)
        by_modality = {modality: sample.media(modality) for modality in MODALITIES}
        return {
            modality: [take(medium, place) for place, medium in enumerate(media)]
            for modality, media in by_modality.items()
            if media
        }

    def decode_medium(self, medium: Media, sample: Sample, key: RowKey | None = None, place: int = 0) -> tuple[str, Decoded]:
        """One medium of a sample, by its place among those of its modality; see `decode`."""
        augment = self.augment.get(medium.modality)
        generator = None if augment is None or key is None else rng(self.seed, key.epoch, self.rows[key.row], place)
        transform = self.processor.encoders[medium.modality].transform
        try:
            content = media_key(medium, self.media_root, transform)
            in_decoding = generator if augment is not None and augment.draws_frames else None
            decoded = decode(medium, self.media_root, self.limits, transform, in_decoding)
        except MediaError as error:
            raise RowError(sample.origin, str(error)) from error
        if augment is None or key is None or generator is None:
            return content, decoded
        return f"{content}@{self.name}.{key.epoch}.{key.row}.{place}", augment(decoded, generator)

    def open_caches(self, media_cache: CacheOptions | None) -> None:
        """From now on looks media up before they are decoded. A loader calls it when it starts: the weights that cached
        features depend on are final then.

        Args:
            media_cache: Where decoded and transformed media are kept; None: nowhere.

        Raises:
            ValueError: A cache cannot be used.
        """
        if not self.processor.takes_prepared:
            if media_cache is not None or self.processor.features is not None:
                log.warning("%s: a ready model prepares the media of a row together, so they are not cached", self.file.path)
            return
        media = None if media_cache is None else media_cache.open()
        features = None if self.processor.features is None else self.processor.features()
        if media is None and features is None:
            self.cached = None
            return
        settings: dict[Modality, str] = {}
        for modality, encoder in self.processor.encoders.items():
            if modality in self.augment:
                log.warning("%s: %s media change at random from epoch to epoch, so they are not cached", self.file.path, modality)
            elif media is not None or (features is not None and modality in features.encoders):
                settings[modality] = media_settings(modality, encoder.transform, self.limits)
        self.cached = CachedMedia(self.media_root, self.limits, settings, media, features)

    def _look_up(self, medium: Media, sample: Sample, key: RowKey, place: int) -> tuple[str, Decoded | Prepared]:
        """A medium with a key of its content, from the caches if it may come from there."""
        if self.cached is None or medium.modality not in self.cached.settings:
            return self.decode_medium(medium, sample, key, place)
        encoder = self.processor.encoders[medium.modality]
        try:
            content = media_key(medium, self.media_root, encoder.transform)
            return content, self.cached.prepare(medium, encoder, lambda medium: self.decode_medium(medium, sample, key, place)[1])
        except MediaError as error:
            raise RowError(sample.origin, str(error)) from error

    def __getitem__(self, key: int | RowKey) -> Example:
        key = key if isinstance(key, RowKey) else RowKey(key, 0)
        if self.answer_form.kind != "single":
            return self._answers(key)
        sample = self.sample(key.row)
        media = self._each_medium(sample, lambda medium, place: self._look_up(medium, sample, key, place))
        example = self.processor(sample, media, generate=self.generate)
        for modality, augment in self.augment.items():
            for place, item in enumerate(example.media.get(modality, [])):
                generator = rng(self.seed, key.epoch, self.rows[key.row], place, stage=1)
                item.media = augment.change_tensor(item.media, generator)
        return example

    def _answers(self, key: RowKey) -> AnswerExample:
        candidates = self.candidates(key.row)
        if self.judge is not None:
            candidates = self.judge(candidates, self.decode)
        taken: dict[tuple[Modality, int], tuple[str, Decoded | Prepared]] = {}

        def take(medium: Media, place: int) -> tuple[str, Decoded | Prepared]:
            taken[medium.modality, place] = content, found = self._look_up(medium, candidates.sample, key, place)
            return content, self._transformed(found, medium.modality, key, place)

        def corrupt(medium: Media, place: int) -> tuple[str, Decoded | Prepared]:
            content, found = taken[medium.modality, place]
            if isinstance(found, Prepared):  # its pixels were not looked at
                found = self.decode_medium(medium, candidates.sample, key, place)[1]
            content, wrong = corrupt_medium(self, medium, (content, found), candidates.sample, key.row, place)
            return content, self._transformed(wrong, medium.modality, key, place)

        return answer_example(candidates, self.processor, self.answer_form, take, corrupt)

    def _transformed(self, found: Decoded | Prepared, modality: Modality, key: RowKey, place: int) -> Decoded | Prepared:
        """What the processor takes: one tensor, however many answers stand behind it; a ready model transforms itself."""
        if isinstance(found, Prepared) or not self.processor.takes_prepared:
            return found
        encoder = self.processor.encoders[modality]
        tensor = encoder.transform(found)
        if (augment := self.augment.get(modality)) is not None:
            tensor = augment.change_tensor(tensor, rng(self.seed, key.epoch, self.rows[key.row], place, stage=1))
        return Prepared(tensor, encoder.num_tokens(media_shape(found)))
