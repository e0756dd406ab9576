"""The answers of a row as examples: each medium is decoded and transformed once, however many answers stand behind it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from datamodules.answer_form import AnswerForm
from datamodules.answer_rows import AnswerExample, Judged
from datamodules.answers import Candidates
from datamodules.batch import MODALITIES, AnswerRole, Example, Modality, RowError
from datamodules.content import Media
from datamodules.conversation import Sample
from datamodules.processor import Processor

Keyed = tuple[str, Any]
"""Key and medium, decoded or `Prepared`, as the processor takes it."""

TakeMedium = Callable[[Media, int], Keyed]
"""Gets a medium by its place among those of its modality in the row: those of the chosen side first."""


def answer_example(
    candidates: Candidates, processor: Processor, form: AnswerForm, take: TakeMedium, corrupt: TakeMedium
) -> AnswerExample:
    """Makes an example of all answers of a row.

    Args:
        candidates: The answers.
        processor: The model's own.
        form: What the objective wants.
        take: Gets a medium; called once for each, also where several sides have it.
        corrupt: Gets a medium of the chosen side, corrupted.

    Raises:
        RowError: One of the answers cannot be used.
    """
    once = _Once(take)
    answers: list[tuple[AnswerRole, Example]] = []
    for candidate in candidates.answers:
        sample = candidate.sample
        processor.check_media(sample)
        try:
            answers.append((candidate.role, processor(sample, once.of(sample))))
        except RowError as error:
            raise RowError(error.origin, f"{candidate.name}: {error.reason}") from error
    if form.corrupt_media and any(candidates.sample.media(modality) for modality in MODALITIES):
        wrong = _Once(corrupt).of(candidates.sample)
        answers.append(("corrupted", processor(candidates.sample, wrong)))
    role, first = answers[0]
    return AnswerExample(
        **vars(replace(first, choices=None)),
        role=role,
        others=answers[1:],
        margin=candidates.margin,
        judged=[Judged(answer.scores, answer.weight, answer.margin) for answer in candidates.answers],
        change=candidates.change,
        form=form,
        max_length=processor.prompt.max_length,
    )


class _Once:
    """The media of several samples of a row; the same medium, as often as it stands in a sample, is got once."""

    def __init__(self, take: TakeMedium) -> None:
        self._take = take
        self._taken: dict[tuple[Media, int], Keyed] = {}
        self._places: Counter[Modality] = Counter()

    def of(self, sample: Sample) -> dict[Modality, Sequence[Keyed]]:
        """Those of a sample, by modality."""
        by_modality = {modality: sample.media(modality) for modality in MODALITIES}
        return {modality: self._each(media) for modality, media in by_modality.items() if media}

    def _each(self, media: Sequence[Media]) -> list[Keyed]:
        seen: Counter[Media] = Counter()
        taken = []
        for medium in media:
            slot = (medium, seen[medium])
            if slot not in self._taken:
                self._taken[slot] = self._take(medium, self._places[medium.modality])
                self._places[medium.modality] += 1
            taken.append(self._taken[slot])
            seen[medium] += 1
        return taken
