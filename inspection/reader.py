"""Rows as records: what a worker does with each, so that a few hundred bytes of it remain."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.utils.data import Dataset

from datamodules.batch import MODALITIES, Modality, RowError
from datamodules.content import Media
from datamodules.conversation import Sample
from datamodules.dataset import MultiModalDataset
from datamodules.media import Decoded
from datamodules.media_audio import Waveform
from datamodules.parts import media_shape
from datamodules.processor import Processor
from datamodules.processor_files import DESCRIPTION
from datamodules.sources import MediaRoot, full_name, media_name
from inspection.excess import find_excess
from inspection.fingerprints import fingerprint
from inspection.measures import measure
from inspection.records import MediumRecord, Part, RowRecord
from inspection.scorers import PairScorer
from inspection.texts import digest_of, question_and_answer, read_text

DecodedMedia = Mapping[Modality, Sequence[tuple[str, Decoded]]]

NO_LIMIT = 2**31 - 1


class RowReader(Dataset[RowRecord]):
    """The rows of all parts as records.

    A row is read as training reads it, without augmentation: its media are decoded by the dataset and made tokens of by the
    processor, once where no limit cuts or refuses it, so that its whole length is known, and if need be once more as it is.

    Args:
        parts: The parts; all of them have one processor.
        scorer: Scores media against their text; None: nobody does.
    """

    def __init__(self, parts: Sequence[Part], scorer: PairScorer | None = None) -> None:
        self.parts = parts
        self.scorer = scorer
        processor = parts[0].dataset.processor
        self.max_length = processor.prompt.max_length
        self.unlimited = without_limit(processor)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[RowRecord]:
        return [self.read(part, row) for part, row in keys]

    def read(self, part: int, row: int) -> RowRecord:
        """The record of a row.

        Args:
            part: The number of its part.
            row: Its number there.
        """
        dataset = self.parts[part].dataset
        samples: list[Sample] = []
        record = RowRecord(part, row)
        decoded: dict[tuple[Media, ...], DecodedMedia] = {}
        media: dict[Media, MediumRecord] = {}
        try:
            samples = dataset.samples(row)
            record = replace(record, text=read_text(samples))
            for sample in samples:
                named = tuple(media_of_row([sample]))
                if named not in decoded:
                    decoded[named] = dataset.decode(sample)
                    media |= self._measure(dataset, sample, decoded[named])
                record = self._tokenise(dataset, sample, decoded[named], record)
        except RowError as error:
            excess = tuple(find_excess(dataset, media_of_row(samples)))
            return replace(record, problem=error.reason, is_too_long=False, num_tokens=(), excess=excess)
        return replace(record, media=tuple(media.values()))

    def _measure(self, dataset: MultiModalDataset, sample: Sample, decoded: DecodedMedia) -> dict[Media, MediumRecord]:
        text = question_and_answer(sample)
        pairs = [pair for modality, items in decoded.items() for pair in zip(sample.media(modality), items, strict=True)]
        return {
            medium: MediumRecord(
                modality=medium.modality,
                name=media_name(medium.files[0]),
                file=_file_of(medium, dataset.media_root),
                shape=media_shape(item),
                seconds=len(item.samples_S) / item.sample_rate if isinstance(item, Waveform) else 0.0,
                measures=measure(item),
                fingerprint=fingerprint(item),
                score=self.scorer.score(item, text) if self.scorer is not None else None,
            )
            for medium, (_, item) in pairs
        }

    def _tokenise(self, dataset: MultiModalDataset, sample: Sample, decoded: DecodedMedia, record: RowRecord) -> RowRecord:
        """The record with the tokens of one of the row's conversations, if it is the longest so far.

        Raises:
            RowError: The row cannot be used, for another reason than its length.
        """
        example = self.unlimited(sample, decoded, generate=dataset.generate)
        of_media = [sum(item.num_tokens for item in example.media.get(modality, [])) for modality in MODALITIES]
        num_tokens = (len(example.tokens) - sum(of_media), *of_media)
        if len(example.tokens) > sum(record.num_tokens):
            record = replace(record, num_tokens=num_tokens)
        if len(example.tokens) > self.max_length and not record.problem:
            try:
                cut = dataset.processor(sample, decoded, generate=dataset.generate)
            except RowError as error:
                return replace(record, problem=error.reason, is_too_long=True)
            return replace(record, num_dropped=record.num_dropped + cut.num_dropped_tokens)
        return record


def media_of_row(samples: Sequence[Sample]) -> list[Media]:
    """The media of the conversations of a row, each once, in the order of a record's."""
    return list(dict.fromkeys(medium for sample in samples for modality in MODALITIES for medium in sample.media(modality)))


def without_limit(processor: Processor) -> Processor:
    """The same processor, to which no row is too long."""
    files = dict(processor.files())
    description = json.loads(files[DESCRIPTION])
    description["prompt"]["max_length"] = NO_LIMIT
    return Processor.from_files({**files, DESCRIPTION: json.dumps(description).encode()})


def _file_of(medium: Media, media_root: MediaRoot) -> bytes:
    names = (full_name(file, media_root) for file in medium.files)
    return digest_of((*names, f"{medium.start}:{medium.end}"))[:8]
