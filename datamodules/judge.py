"""The answers of a row, judged by reward criteria: scored, and left out, exchanged, weighed or chosen by their scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datamodules.answers import Candidate, Candidates
from datamodules.batch import FilteredRowError, Modality
from datamodules.conversation import Message, Sample, Text
from datamodules.criteria import (
    CriteriaUse,
    RewardCriterion,
    Scores,
    below_floor,
    difference,
    pair_margin,
    pair_weight,
    terms_of,
    totals,
)
from datamodules.media import Decoded
from datamodules.scorers import Response

DecodeSample = Callable[[Sample], Mapping[Modality, Sequence[tuple[str, Decoded]]]]


class Judge:
    """Judges the answers of rows. It is a pure function of the row, and is sent to the processes that load data.

    Args:
        criteria: The reward criteria, at least one.
        use: What is done with the scores.

    Raises:
        ValueError: Two criteria have one name, or none has a weight.
    """

    def __init__(self, criteria: Sequence[RewardCriterion], use: CriteriaUse) -> None:
        self.terms = terms_of([(criterion.label, criterion.term) for criterion in criteria], "data.reward_criteria")
        self.criteria = tuple(criteria)
        self.use = use

    @property
    def builds(self) -> bool:
        """Whether rows have sampled answers, of which pairs are made."""
        return self.use.mode == "build"

    def monitoring(self) -> "Judge":
        """One that changes no pair: for rows that are evaluated."""
        return self if self.builds else Judge(self.criteria, replace(self.use, mode="monitor"))

    def __call__(self, candidates: Candidates, decode: DecodeSample) -> Candidates:
        """The answers with their scores, and what follows from these.

        Args:
            candidates: The answers of a row; the chosen or the only one first.
            decode: Decodes the media of a conversation; called where a criterion needs them.

        Raises:
            FilteredRowError: The row is left out.
            RowError: A medium cannot be used.
            ValueError: A scorer gave something else than scores.
        """
        scored = self._scored(candidates, decode)
        match self.use.mode:
            case "filter":
                return self._filtered(scored)
            case "relabel":
                return self._relabelled(scored)
            case "build":
                return self._built(scored)
            case "weight":
                return self._each(scored, lambda own: {"weight": pair_weight(own, self.use.temperature)})
            case "margin":
                return self._each(scored, lambda own: {"margin": pair_margin(own)})
        return scored

    def _scored(self, candidates: Candidates, decode: DecodeSample) -> Candidates:
        looks = any(criterion.scorer.needs_media for criterion in self.criteria)
        responses = [response_of(answer.sample, decode if looks else None) for answer in candidates.answers]
        columns: dict[str, list[float | None]] = {}
        for criterion in self.criteria:
            columns[criterion.label] = found = criterion.scorer(responses)
            if len(found) != len(responses) or not all(score is None or 0 <= score <= 1 for score in found):
                raise ValueError(
                    f"the reward criterion {criterion.label} gave {found} for {len(responses)} answer(s) of "
                    f"{candidates.sample.origin}: a scorer gives each answer a number in [0, 1], or None"
                )
        answers = [
            replace(answer, scores={name: scores[number] for name, scores in columns.items()})
            for number, answer in enumerate(candidates.answers)
        ]
        return replace(candidates, answers=tuple(answers))

    def _filtered(self, candidates: Candidates) -> Candidates:
        chosen, *others = candidates.answers
        if chosen.role in ("chosen", "desirable") and (name := below_floor(chosen.scores, self.terms)) is not None:
            raise FilteredRowError(chosen.sample.origin, f"{chosen.name} has {self._below(chosen, name)}")
        reasons = [(other, self._not_better(chosen, other)) for other in others]
        kept = [other for other, reason in reasons if reason is None]
        text = "; ".join(f"{chosen.name} {reason}" for _, reason in reasons if reason is not None)
        if others and not kept:
            raise FilteredRowError(chosen.sample.origin, text)
        return replace(candidates, answers=(chosen, *kept), change=f"left out: {text}" if text else "")

    def _not_better(self, chosen: Candidate, rejected: Candidate) -> str | None:
        both = totals([chosen.scores, rejected.scores], self.terms)
        if both is None or both[0] - both[1] >= self.use.min_difference:
            return None
        return (
            f"scores {both[0]:.3g} and {rejected.name} {both[1]:.3g}, but is to be better by "
            f"criteria_use.min_difference = {self.use.min_difference:g}"
        )

    def _below(self, answer: Candidate, name: str) -> str:
        return f"{name} {answer.scores[name]:.3g}, below its floor of {self.terms[name].floor:g}"

    def _relabelled(self, candidates: Candidates) -> Candidates:
        """The best rejected answer changes places with the chosen one, if it is clearly better."""
        chosen, *others = candidates.answers
        gains = [-(difference(chosen.scores, other.scores, self.terms) or 0.0) for other in others]
        best = max(gains, default=0.0)
        if best <= 0 or best < self.use.min_difference:
            return candidates
        place = gains.index(best)
        better = others[place]
        others[place] = replace(chosen, role=better.role)
        texts = ", ".join(f"{answer.name}: {_text(answer.scores)}" for answer in (chosen, better))
        # by how much the row's chosen answer was better says nothing any more
        others = [replace(other, margin=0.0) for other in others]
        return Candidates(
            (replace(better, role=chosen.role), *others),
            candidates.margin,
            f"exchanged: {better.name} is better than {chosen.name} by {best:.3g} ({texts})",
        )

    def _built(self, candidates: Candidates) -> Candidates:
        """A pair of the best and the worst answer; of equals the first one."""
        answers, origin = candidates.answers, candidates.sample.origin
        values = totals([answer.scores for answer in answers], self.terms)
        if values is None:
            raise FilteredRowError(origin, f"no reward criterion scores all of the {len(answers)} answers")
        best, worst = (values.index(value) for value in (max(values), min(values)))
        if (name := below_floor(answers[best].scores, self.terms)) is not None:
            raise FilteredRowError(origin, f"even the best of the {len(answers)} answers has {self._below(answers[best], name)}")
        if values[best] == values[worst] or values[best] - values[worst] < self.use.min_difference:
            raise FilteredRowError(
                origin,
                f"the best of the {len(answers)} answers scores {values[best]:.3g} and the worst {values[worst]:.3g}: they are "
                f"to differ, by criteria_use.min_difference = {self.use.min_difference:g} at least",
            )
        roles = answers[0].role, answers[1].role
        pair = [replace(answers[number], role=role) for number, role in zip((best, worst), roles, strict=True)]
        return replace(candidates, answers=tuple(pair))

    def _each(self, candidates: Candidates, options: Callable[[float | None], dict[str, Any]]) -> Candidates:
        """The rejected answers with what follows from the difference of their scores."""
        chosen, *others = candidates.answers
        others = [replace(other, **options(difference(chosen.scores, other.scores, self.terms))) for other in others]
        return replace(candidates, answers=(chosen, *others))


def response_of(sample: Sample, decode: DecodeSample | None = None) -> Response:
    """The supervised part of a conversation as an answer to the user message before it.

    Args:
        sample: The conversation.
        decode: Decodes its media; None: the scorers need none.
    """
    first = next(number for number, message in enumerate(sample.messages) if message.supervised)
    asked = [message for message in sample.messages[:first] if message.role == "user"]
    said = [_text_of(message) for message in sample.messages[first:] if message.supervised]
    media = {} if decode is None else {modality: [item for _, item in items] for modality, items in decode(sample).items()}
    return Response(_text_of(asked[-1]) if asked else "", "\n".join(said), media, sample.columns)


def _text_of(message: Message) -> str:
    return " ".join(piece.text for piece in message.content if isinstance(piece, Text)).strip()


def _text(scores: Scores) -> str:
    return " ".join(f"{name} {'none' if score is None else f'{score:.3g}'}" for name, score in scores.items())
