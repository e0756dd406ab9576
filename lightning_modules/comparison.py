"""What an objective that compares answers is given, and what it gives back; and how its metrics come to the rows of a batch.

Shape suffixes: A answers, P pairs, K terms of a loss, B rows of a batch, X what a metric has a value for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor

from datamodules.batch import AnswerRole, Answers, Batch, answers_of_positions
from lightning_modules.epoch_means import RowValues
from lightning_modules.logprobs import AnswerLogps, Statistic, TokenScores
from lightning_modules.pair_logps import Loss, Metrics, each


@dataclass(frozen=True)
class ScoredAnswers:
    """The answers of a batch with their log-probabilities.

    Args:
        policy: Those under the policy.
        reference: Those under the reference, without gradients; None: there is none.
        tokens: What else the policy makes of each token; None: an answer has one value, its reward.
        roles: What each answer is.
        row_A: The entry of `examples` of the batch that each answer belongs to.
        pairs_P2: The chosen and the rejected answer of each pair.
        margin_P: By how much the chosen one is better.
        weight_P: Weight of each pair.
        media_pairs_M2: A chosen answer and the same answer behind corrupted media.
        counts_A: Which answers count.
        blank: Log-probabilities under the reference behind blank media; None: nobody asked for them.
        scores_A: What reward criteria say of each answer, by their names; NaN: nothing.
    """

    policy: AnswerLogps
    reference: AnswerLogps | None
    tokens: TokenScores | None
    roles: list[AnswerRole]
    row_A: Tensor
    pairs_P2: Tensor
    margin_P: Tensor
    weight_P: Tensor
    media_pairs_M2: Tensor
    counts_A: Tensor
    blank: AnswerLogps | None = None
    scores_A: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        answers: Answers,
        policy: AnswerLogps,
        reference: AnswerLogps | None = None,
        tokens: TokenScores | None = None,
        blank: AnswerLogps | None = None,
    ) -> "ScoredAnswers":
        """The answers of a batch, as it has them."""
        return cls(
            policy=policy,
            reference=reference,
            tokens=tokens,
            roles=answers["roles"],
            row_A=torch.tensor(answers["example_A"], device=answers["row_A"].device),
            pairs_P2=answers["pairs_P2"],
            margin_P=answers["margin_P"],
            weight_P=answers["weight_P"],
            media_pairs_M2=answers["media_pairs_M2"],
            counts_A=torch.ones_like(answers["row_A"], dtype=torch.bool),
            blank=blank,
            scores_A=answers.get("scores_A", {}),
        )

    @property
    def against(self) -> AnswerLogps:
        """The reference, which the objective has."""
        assert self.reference is not None
        return self.reference

    @property
    def weights(self) -> Tensor | None:
        """Weight of each pair; None: they weigh the same."""
        return None if bool((self.weight_P == 1).all()) else self.weight_P

    def are(self, *roles: AnswerRole) -> Tensor:
        """Which answers have one of these roles: is_A."""
        return torch.tensor([role in roles for role in self.roles], dtype=torch.bool, device=self.row_A.device)

    def in_rows(self, is_in_B: Tensor) -> "ScoredAnswers":
        """The same, of which the answers and pairs of some rows alone count; the answers keep their numbers.

        Args:
            is_in_B: Which rows of the batch.
        """
        is_in_P, is_in_M = (is_in_B[self.row_A[pairs[:, 0]]] for pairs in (self.pairs_P2, self.media_pairs_M2))
        return replace(
            self,
            pairs_P2=self.pairs_P2[is_in_P],
            margin_P=self.margin_P[is_in_P],
            weight_P=self.weight_P[is_in_P],
            media_pairs_M2=self.media_pairs_M2[is_in_M],
            counts_A=is_in_B[self.row_A],
        )


@dataclass(frozen=True)
class Comparison:
    """The loss of a batch of answers, and its metrics.

    Args:
        total: Sum of the losses of pairs or answers; of a loss of several terms total_K.
        count: Their number, or the sum of their weights; in the same shape.
        metrics: Metrics, each with the answers that its values belong to, one a value: answer_X.
    """

    total: Tensor
    count: Tensor
    metrics: list[tuple[Metrics, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, loss: Loss, answer_X: Tensor) -> "Comparison":
        """A loss, and the answers that the values of its metrics belong to."""
        total, count, metrics = loss
        return cls(total, count, [(metrics, answer_X)])


def unscored(batch: Batch) -> ScoredAnswers:
    """The answers of a batch before a model has seen them, all log-probabilities 0: what a loss of them counts is known already.

    Args:
        batch: It may be one without rows.
    """
    none, no_pairs = torch.empty(0, dtype=torch.long), torch.empty(0, 2, dtype=torch.long)
    answers: Answers = batch.get("answers") or {
        "row_A": none,
        "branch_A": none,
        "roles": [],
        "keys": [],
        "pairs_P2": no_pairs,
        "margin_P": torch.empty(0),
        "weight_P": torch.empty(0),
        "media_pairs_M2": no_pairs,
        "continues_B": [],
        "example_A": [],
    }
    answer_S = answers_of_positions(batch) if batch["examples"] else none
    zero_S = torch.zeros(len(answer_S))
    logps = AnswerLogps(zero_S, answer_S, len(answers["roles"]))
    tokens = TokenScores(zero_S, zero_S.bool(), dict.fromkeys(get_args(Statistic), zero_S))
    return ScoredAnswers.of(answers, logps, logps, tokens)


@torch.no_grad()
def token_metrics(scored: ScoredAnswers) -> list[tuple[Metrics, Tensor]]:
    """What the policy makes of the tokens of answers, with TRL's names.

    Returns:
        `mean_token_accuracy` and `entropy` of the chosen (or desirable) answers; `logits/chosen` and `logits/rejected`, the mean
        over tokens and vocabulary. Those whose statistics were not computed are left out.
    """
    if scored.tokens is None:
        return []
    found: list[tuple[Metrics, Tensor]] = []
    answer_S, statistics = scored.policy.answer_S, scored.tokens.statistics
    for side, is_own_A in (("chosen", scored.are("chosen", "desirable")), ("rejected", scored.are("rejected", "undesirable"))):
        values = {"mean_token_accuracy": scored.tokens.correct_S.float()} if side == "chosen" else {}
        if side == "chosen" and "entropy" in statistics:
            values["entropy"] = statistics["entropy"]
        if "mean_logit" in statistics:
            values[f"logits/{side}"] = statistics["mean_logit"]
        is_own_S = is_own_A[answer_S]
        found.append(({name: each(value_S[is_own_S]) for name, value_S in values.items()}, answer_S[is_own_S]))
    return found


def row_values(metrics: Iterable[tuple[Metrics, Tensor]], row_A: Tensor, num_rows: int) -> dict[str, RowValues]:
    """Brings metrics to the rows of a batch.

    Args:
        metrics: As in `Comparison`.
        row_A: The row of each answer.
        num_rows: B.

    Returns:
        Totals and counts by row, for `EpochMeans`.
    """
    values: dict[str, RowValues] = {}
    for group, answer_X in metrics:
        row_X = row_A[answer_X]
        for name, pair in group.items():
            total_B, count_B = (x.new_zeros(num_rows, dtype=torch.float32).index_add(0, row_X, x.float()) for x in pair)
            values[name] = total_B, count_B
    return values
