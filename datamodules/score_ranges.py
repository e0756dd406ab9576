"""Which reward criteria tell nothing apart. Shape suffixes: A answers, C criteria."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from datamodules.batch import AnswerRole

ENOUGH = 200
"""Answers after which a process that judges alone says that a criterion gave the same to each."""

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Scores that differ by no more than this part of their size are the same: those of a model are rounded by their batch."""

Reduce = Callable[[Tensor, Literal["sum", "max"]], Tensor]
"""Makes one tensor of those of all processes, which must meet there."""


def alone(own: Tensor, reduce_op: Literal["sum", "max"]) -> Tensor:
    """What a process that judges alone makes of its own."""
    return own


class ScoreRanges:
    """The lowest and the highest score that each criterion gave so far, where the scores are: no batch waits for its device.

    Args:
        names: Of the criteria, the same in all processes that judge together. Others are added as they are met.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._sums: dict[str, Tensor] = {}  # answers, and scores given
        self._most: dict[str, Tensor] = {}  # the lowest score with its sign turned, and the highest; -inf: none
        self._reported: set[str] = set()
        for name in names:
            self._begin(name)

    def _begin(self, name: str) -> None:
        self._sums[name], self._most[name] = torch.zeros(2), torch.full((2,), -torch.inf)

    def add(self, scores_A: Mapping[str, Tensor], roles: Sequence[AnswerRole]) -> None:
        """Takes account of a batch.

        Args:
            scores_A: By the name of each criterion its score of each answer; NaN: none.
            roles: What each answer is; those that are not of the data are left out.
        """
        if not roles:
            return
        own = torch.tensor([role not in ("corrupted", "mismatched") for role in roles])
        for name, score_A in scores_A.items():
            if name not in self._sums:
                self._begin(name)
            own_A = own.to(score_A.device)
            given_A = own_A & ~score_A.isnan()
            both_2A = torch.stack([-score_A.detach(), score_A.detach()]).float()
            most_2 = both_2A.where(given_A, -torch.inf).amax(1)
            self._sums[name] = self._sums[name].to(score_A.device) + torch.stack([own_A.sum(), given_A.sum()])
            self._most[name] = torch.maximum(self._most[name].to(score_A.device), most_2)

    def constant(self, at_least: int = 2, reduce: Reduce = alone) -> list[str]:
        """Says of each criterion, once, that it gave the same to all of at least so many answers.

        Args:
            at_least: Answers of all processes that judge together.
            reduce: Over these processes.
        """
        names = [name for name in self._sums if name not in self._reported]
        if not names:
            return []
        sums_C2 = reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
        most_C2 = reduce(torch.stack([self._most[name] for name in names]), "max").tolist()
        said = []
        for name, (answers, scored), (below, highest) in zip(names, sums_C2, most_C2, strict=True):
            if answers >= at_least and (not scored or math.isclose(-below, highest, rel_tol=ROUNDING)):
                self._reported.add(name)
                what = f"the score {highest:.3g}" if scored else "no score"
                of = f"each of {int(scored or answers)} answers"
                said.append(f"the reward criterion {name} gave {what} to {of}: it tells nothing apart")
        return said
