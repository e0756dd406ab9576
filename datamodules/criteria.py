"""Reward criteria: what several scorers say of the answers of a row, and what follows from it for a pair.

The score of an answer, S, is the mean of its scores by the weights of the criteria; an answer that is below a floor has 0,
whatever else is good about it. A criterion that says nothing about an answer (None) is left out of it, never 0. Two answers are
compared by the criteria that score both; where there is none, they are not compared, and the pair stays as it is.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from datamodules.scorers import Scorer

Scores = Mapping[str, float | None]
"""What each criterion says of an answer, by its name."""

CriteriaMode = Literal["monitor", "filter", "relabel", "weight", "margin", "build"]


@dataclass(frozen=True)
class Term:
    """How much a criterion counts.

    Args:
        weight: Its weight in the mean, at least 0.
        floor: The least score, in [0, 1], that an answer must have.
    """

    weight: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"the weight of a reward criterion is a number, at least 0, got {self.weight}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"the floor of a reward criterion is a score, in [0, 1], got {self.floor}")


Terms = Mapping[str, Term]
"""The criteria by their names."""


class Named(Protocol):
    """A scorer of any kind, by what metrics call it."""

    name: ClassVar[str]


@dataclass(frozen=True)
class Criterion:
    """A scorer of any kind, and how much it counts.

    Args:
        scorer: Scores the answers.
        weight: Its weight in the mean; 0: only the floor counts.
        floor: An answer that it scores lower is bad, whatever the other criteria say of it.
        name: What metrics and files call it; None: as the scorer is called.
    """

    scorer: Named
    weight: float = 1.0
    floor: float = 0.0
    name: str | None = None

    def __post_init__(self) -> None:
        Term(self.weight, self.floor)

    @property
    def label(self) -> str:
        """Its name."""
        return self.scorer.name if self.name is None else self.name

    @property
    def term(self) -> Term:
        """How much it counts."""
        return Term(self.weight, self.floor)


@dataclass(frozen=True)
class RewardCriterion(Criterion):
    """A scorer, and how much it counts.

    Args:
        scorer: Scores the answers.
    """

    scorer: Scorer


@dataclass(frozen=True)
class CriteriaUse:
    """What is done with the scores of training pairs. Validation and test pairs are only monitored.

    Args:
        mode: `monitor`: nothing, they are logged. `filter`: a pair is left out where the chosen answer is below a floor or not
            better by `min_difference`. `relabel`: the answers change places where the rejected one is better by
            `min_difference`. `weight`: a pair has the weight 2 sigmoid(D / temperature), where D is the difference of the
            scores: 1 for a tie, up to 2 where the scores agree with the label, down to 0 where they do not. `margin`: D, but at
            least 0, is the pair's margin, in the place of the row's; an objective multiplies it by its `margin_weight`.
            `build`: rows have `answers`, a list of them; the best becomes the chosen one, the worst the rejected one, in each
            split.
        min_difference: A difference of scores, in [0, 1].
        temperature: A difference of scores that is clear, above 0; at it `weight` is 1.46.
    """

    mode: CriteriaMode = "monitor"
    min_difference: float = 0.1
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.min_difference <= 1:
            raise ValueError(f"criteria_use.min_difference is a difference of scores, in [0, 1], got {self.min_difference}")
        if not self.temperature > 0:
            raise ValueError(f"criteria_use.temperature is a difference of scores, above 0, got {self.temperature}")


def terms_of(criteria: Sequence[tuple[str, Term]], option: str) -> dict[str, Term]:
    """Criteria by their names.

    Args:
        criteria: Name and term of each.
        option: What their list is called on the command line.

    Raises:
        ValueError: Two have one name, or none has a weight.
    """
    names = [name for name, _ in criteria]
    for name in names:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{option} has the name {name!r}: a name is of letters, digits, _ and -, at least one")
        if names.count(name) > 1:
            raise ValueError(f"{option} has {names.count(name)} criteria called {name}: give them a name of their own (name: …)")
    if criteria and not any(term.weight for _, term in criteria):
        raise ValueError(f"{option}: none of {', '.join(names)} has a weight above 0, so that no answer has a score")
    return dict(criteria)


def below_floor(scores: Scores, terms: Terms) -> str | None:
    """The name of a criterion whose floor an answer is below; None: there is none."""
    return next((name for name, score in scores.items() if score is not None and score < terms[name].floor), None)


def totals(answers: Sequence[Scores], terms: Terms) -> list[float] | None:
    """S of each of several answers that are compared; None: no criterion with a weight scores all of them.

    S = sum_k w_k s_k / sum_k w_k over the criteria k that score all of the answers; 0 for an answer that is below a floor.

    Args:
        answers: Their scores.
        terms: The criteria.
    """
    common = [name for name in terms if all(scores.get(name) is not None for scores in answers)]
    weight = sum(terms[name].weight for name in common)
    if weight == 0:
        return None
    return [
        0.0
        if below_floor(scores, terms) is not None
        else sum(terms[name].weight * (scores[name] or 0.0) for name in common) / weight
        for scores in answers
    ]


def difference(chosen: Scores, rejected: Scores, terms: Terms) -> float | None:
    """D = S(chosen) - S(rejected); None: they cannot be compared."""
    both = totals([chosen, rejected], terms)
    return None if both is None else both[0] - both[1]


def pair_weight(difference: float | None, temperature: float) -> float:
    """2 sigmoid(D / temperature); 1 where there is no D."""
    return 1.0 if difference is None else 1.0 + math.tanh(difference / temperature / 2)


def pair_margin(difference: float | None) -> float | None:
    """max(D, 0); None where there is no D."""
    return None if difference is None else max(difference, 0.0)
