"""Which reward criteria tell nothing apart. Shape suffixes: A answers."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.batch import AnswerRole

log = logging.getLogger(__name__)

ENOUGH = 200
"""Answers after which a criterion that gave the same to each is reported in the middle of an epoch."""

ROUNDING = 1e-6
"""Scores that differ by no more are the same: those of a model are rounded by their batch."""


@dataclass
class _Range:
    answers: int = 0
    scored: int = 0
    lowest: float = float("inf")
    highest: float = -float("inf")


class ScoreRanges:
    """The lowest and the highest score that each criterion gave so far."""

    def __init__(self) -> None:
        self._seen: dict[str, _Range] = {}
        self._reported: set[str] = set()

    def add(self, scores_A: Mapping[str, Tensor], roles: Sequence[AnswerRole]) -> None:
        """Takes account of a batch.

        Args:
            scores_A: By the name of each criterion its score of each answer; NaN: none.
            roles: What each answer is; those that are not of the data are left out.
        """
        is_own_A = torch.tensor([role not in ("corrupted", "mismatched") for role in roles])
        for name, score_A in scores_A.items():
            own_A = score_A.cpu()[is_own_A]
            given = own_A[~own_A.isnan()].tolist()
            seen = self._seen.setdefault(name, _Range())
            seen.answers += len(own_A)
            seen.scored += len(given)
            seen.lowest, seen.highest = min([seen.lowest, *given]), max([seen.highest, *given])
        self.report(ENOUGH)

    def report(self, at_least: int = 2) -> None:
        """Names each criterion, once, that gave the same to all of at least so many answers."""
        for name, seen in self._seen.items():
            if name in self._reported or seen.answers < at_least or seen.highest - seen.lowest > ROUNDING:
                continue
            self._reported.add(name)
            what = "no score" if not seen.scored else f"the score {seen.lowest:.3g}"
            log.warning(
                "the reward criterion %s gave %s to each of %d answers: it tells nothing apart",
                name,
                what,
                seen.scored or seen.answers,
            )
