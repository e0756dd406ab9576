"""Log-probabilities of pairs of answers, and how losses over them are summed and logged.

A loss is `(sum, count, metrics)`, and who calls it divides once. A loss of several terms that count different things, such as
pairs and tokens, has a sum and a count of each, total_K and count_K, and its mean is the sum of theirs. A metric is what each
pair has of it, total and number of summands, so that its mean is exact over rows, sources and processes.

Shape suffixes: S supervised positions, A answers, P pairs, K terms, 2 chosen and rejected.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.logprobs import AnswerLogps

Metrics = dict[str, tuple[Tensor, Tensor]]
Loss = tuple[Tensor, Tensor, Metrics]


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of the chosen and the rejected answer of each pair.

    Args:
        chosen_P: Of the whole chosen answer; under LD-DPO with a lower weight of its tokens beyond the common length.
        rejected_P: The same of the rejected answer.
        chosen_count_P: Tokens of the chosen answer.
        rejected_count_P: Tokens of the rejected answer.
        chosen_nll_P: Negative log-likelihood of the chosen answer, all of its tokens alike.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_count_P: Tensor
    rejected_count_P: Tensor
    chosen_nll_P: Tensor

    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities a token, of the chosen and the rejected answers."""
        return self.chosen_P / self.chosen_count_P.clamp(min=1), self.rejected_P / self.rejected_count_P.clamp(min=1)


def pair_logps(answers: AnswerLogps, pairs_P2: Tensor, ld_alpha: float = 1.0) -> PairLogps:
    """Sums the tokens of the answers of pairs.

    Args:
        answers: Token log-probabilities of a policy or of a reference.
        pairs_P2: The chosen and the rejected answer of each pair; an answer may be in several pairs.
        ld_alpha: Weight of the tokens beyond the length that the two answers of a pair share, in [0, 1]; 1: as all others
            (LD-DPO, arXiv 2409.06411).

    Raises:
        ValueError: `ld_alpha` is not in [0, 1].
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha is the weight of the tokens beyond the common length, in [0, 1], got {ld_alpha}")
    chosen, rejected = pairs_P2.unbind(1)
    sums_A, counts_A = answers.sums(), answers.counts()
    chosen_P, rejected_P = sums_A[chosen], sums_A[rejected]
    if ld_alpha < 1:
        common_P = torch.minimum(counts_A[chosen], counts_A[rejected])
        chosen_P = answers.sums_by_length(chosen, common_P, ld_alpha)
        rejected_P = answers.sums_by_length(rejected, common_P, ld_alpha)
    return PairLogps(chosen_P, rejected_P, counts_A[chosen], counts_A[rejected], -sums_A[chosen])


@torch.no_grad()
def wpo_importance(policy: AnswerLogps, log_square_S: Tensor, pairs_P2: Tensor) -> Tensor:
    """How likely the policy itself would give the two answers of a pair, aligned so that a sampled answer has about 1.

    w(y) = exp(mean_t(log p(y_t) - log sum_v p(v)^2)), and importance_P = w(chosen) w(rejected), without gradients
    (WPO, arXiv 2406.11827, equation 2).

    Args:
        policy: Token log-probabilities of the policy.
        log_square_S: `log_square` of `logprobs.score_tokens`, for the same positions.
        pairs_P2: The chosen and the rejected answer of each pair.
    """
    aligned = AnswerLogps(policy.logps_S - log_square_S, policy.answer_S, policy.num_answers)
    return aligned.means()[pairs_P2].sum(1).exp()


def smoothed_logistic(logits_P: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z): the label of a pair is wrong with probability e (cDPO)."""
    loss_P = -F.logsigmoid(logits_P)
    if label_smoothing == 0:
        return loss_P
    return (1 - label_smoothing) * loss_P - label_smoothing * F.logsigmoid(-logits_P)


def pair_loss(loss_P: Tensor, weight_P: Tensor | None, metrics: Metrics) -> Loss:
    """Sums the losses of pairs.

    Args:
        loss_P: Loss of each pair.
        weight_P: Weight of each pair in the mean; None: 1.
        metrics: Passed on.

    Returns:
        sum of weight * loss, sum of the weights (the number of pairs, without weights), and the metrics.
    """
    weight_P = torch.ones_like(loss_P) if weight_P is None else weight_P
    return (weight_P * loss_P).sum(), weight_P.sum(), metrics


def token_nll(policy: PairLogps) -> Loss:
    """Negative log-likelihood of the chosen answers, which counts their tokens: a mean of tokens, not of answers."""
    return policy.chosen_nll_P.sum(), policy.chosen_count_P.sum(), {}


def combine(loss: Loss, *terms: tuple[float, Loss]) -> Loss:
    """Adds terms to a loss that have a count of their own.

    Args:
        loss: The first term, or several.
        terms: Weights and losses.

    Returns:
        total_K, the sums times their weights, count_K, and the metrics of all.
    """
    total, count, metrics = loss
    totals, counts = [total.reshape(-1)], [count.reshape(-1)]
    for weight, (term_total, term_count, term_metrics) in terms:
        totals.append(weight * term_total.reshape(-1))
        counts.append(term_count.reshape(-1).to(count.dtype))
        metrics = metrics | term_metrics
    return torch.cat(totals), torch.cat(counts), metrics


def mean(total: Tensor, count: Tensor) -> Tensor:
    """The mean of a loss: the sum of those of its terms; a term that counts nothing is 0.

    Args:
        total: Of the one term, or total_K.
        count: In the same shape.
    """
    return (total / torch.where(count > 0, count, 1)).sum()


@torch.no_grad()
def reward_metrics(chosen_P: Tensor, rejected_P: Tensor) -> Metrics:
    """TRL's `rewards/chosen`, `rewards/rejected`, `rewards/margins`, and `rewards/accuracies` (a tie is wrong)."""
    values = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": (chosen_P > rejected_P).to(chosen_P.dtype),
    }
    return {name: each(value_P) for name, value_P in values.items()}


@torch.no_grad()
def logp_metrics(policy: PairLogps, normalized: bool = False) -> Metrics:
    """TRL's `logps/chosen`, `logps/rejected` (of whole answers, or a token where the loss normalizes), and `nll_loss`."""
    chosen_P, rejected_P = policy.means() if normalized else (policy.chosen_P, policy.rejected_P)
    nll = policy.chosen_nll_P.detach(), policy.chosen_count_P
    return {"logps/chosen": each(chosen_P), "logps/rejected": each(rejected_P), "nll_loss": nll}


def each(value_P: Tensor) -> tuple[Tensor, Tensor]:
    """A metric of which each pair has one value."""
    value_P = value_P.detach()
    return value_P, torch.ones_like(value_P)
