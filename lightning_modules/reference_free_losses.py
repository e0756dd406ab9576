"""Losses over pairs of answers that need no reference: SimPO and AlphaPO, CPO, ORPO, and the reward model's.

With s the policy's log-probability of a whole answer and m the same divided by its tokens, of the chosen answer (c) and the
rejected one (r).

Shape suffixes: P pairs.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.pair_logps import (
    Loss,
    PairLogps,
    combine,
    each,
    logp_metrics,
    pair_loss,
    reward_metrics,
    smoothed_logistic,
    token_nll,
)

CPOKind = Literal["sigmoid", "hinge", "ipo"]


def simpo(
    policy: PairLogps,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    weight_P: Tensor | None = None,
) -> Loss:
    """SimPO: -log sigmoid(beta (m_c - m_r) - gamma) (arXiv 2405.14734, equation 6).

    With `alpha`, AlphaPO: the reward beta (1 - e^(-alpha m)) / alpha takes the place of beta m (arXiv 2501.03884).

    Args:
        policy: Log-probabilities under the policy.
        beta: Scale of the reward; the paper has 2 to 10.
        gamma: By how much the chosen reward is to be larger; the paper has 0.3 to 0.8 times beta.
        alpha: Shape of AlphaPO's reward; 0: SimPO.
        label_smoothing: Probability that the label of a pair is wrong.
        nll_weight: Weight of the chosen answers' negative log-likelihood a token; SimPO has none.
        weight_P: Weight of each pair in the mean; None: 1.

    Returns:
        Sum, number of pairs, and TRL's metrics, log-probabilities a token. With `nll_weight` those of tokens come second.
    """
    chosen_P, rejected_P = (beta * _alpha_reward(mean_P, alpha) for mean_P in policy.means())
    metrics = reward_metrics(chosen_P, rejected_P) | logp_metrics(policy, normalized=True)
    loss_P = smoothed_logistic(chosen_P - rejected_P - gamma, label_smoothing)
    return _with_nll(policy, pair_loss(loss_P, weight_P, metrics), nll_weight)


def cpo(
    policy: PairLogps,
    kind: CPOKind = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    weight_P: Tensor | None = None,
) -> Loss:
    """CPO: -log sigmoid(beta (s_c - s_r)) + nll_weight * NLL(chosen) a token (arXiv 2401.08417, equation 3).

    Args:
        policy: Log-probabilities under the policy.
        kind: `sigmoid`, as above; `hinge`, max(0, 1 - beta (s_c - s_r)); `ipo`, (m_c - m_r - 1 / (2 beta))^2.
        beta: Scale of the reward.
        label_smoothing: Probability that the label of a pair is wrong; for `sigmoid`.
        nll_weight: Weight of the chosen answers' negative log-likelihood a token.
        weight_P: Weight of each pair in the mean; None: 1.

    Returns:
        Sums and numbers, of pairs and of tokens, and TRL's metrics.

    Raises:
        ValueError: `label_smoothing` means nothing to the kind.
    """
    if label_smoothing > 0 and kind != "sigmoid":
        raise ValueError(f"label_smoothing {label_smoothing} means nothing to the kind {kind}: set it to 0, or use sigmoid")
    normalized = kind == "ipo"
    chosen_P, rejected_P = policy.means() if normalized else (policy.chosen_P, policy.rejected_P)
    metrics = reward_metrics(beta * chosen_P, beta * rejected_P) | logp_metrics(policy, normalized)
    delta_P = chosen_P - rejected_P
    if kind == "sigmoid":
        loss_P = smoothed_logistic(beta * delta_P, label_smoothing)
    elif kind == "hinge":
        loss_P = torch.relu(1 - beta * delta_P)
    else:
        loss_P = (delta_P - 1 / (2 * beta)).square()
    return _with_nll(policy, pair_loss(loss_P, weight_P, metrics), nll_weight)


def orpo(policy: PairLogps, beta: float = 0.1, weight_P: Tensor | None = None) -> Loss:
    """ORPO: NLL(chosen) a token - beta log sigmoid(log odds_c - log odds_r), odds = e^m / (1 - e^m).

    arXiv 2403.07691, equations 4 to 7. The likelihood is that of the answer alone: one of the prompt would have the model
    predict the placeholders of media.

    Args:
        policy: Log-probabilities under the policy.
        beta: Weight of the odds ratio, the paper's lambda.
        weight_P: Weight of each pair in the mean of the odds ratio; None: 1.

    Returns:
        Sums and numbers, of pairs and of tokens, and TRL's metrics, with `log_odds_ratio`, the mean of log sigmoid, and
        `log_odds_chosen`.
    """
    chosen_P, rejected_P = policy.means()
    log_odds_P = _log_odds(chosen_P) - _log_odds(rejected_P)
    ratio_P = F.logsigmoid(log_odds_P)
    metrics = reward_metrics(beta * chosen_P, beta * rejected_P) | logp_metrics(policy, normalized=True)
    metrics |= {"log_odds_ratio": each(ratio_P), "log_odds_chosen": each(log_odds_P)}
    return _with_nll(policy, pair_loss(-beta * ratio_P, weight_P, metrics), 1.0)


def bradley_terry(
    chosen_P: Tensor,
    rejected_P: Tensor,
    margin_P: Tensor | None = None,
    centering: float = 0.0,
    weight_P: Tensor | None = None,
) -> Loss:
    """A reward model's loss: -log sigmoid(r_c - r_r - margin) + centering (r_c + r_r)^2.

    Bradley and Terry 1952; the margin is that of Llama 2 (arXiv 2307.09288, equation 2), the centering of arXiv 2312.09244,
    where 0.01 is usual.

    Args:
        chosen_P: Reward of the chosen answer.
        rejected_P: Reward of the rejected answer.
        margin_P: By how much the chosen answer is better; None: 0.
        centering: Weight of the square of the sum, which keeps the rewards about 0.
        weight_P: Weight of each pair in the mean; None: 1.

    Returns:
        Sum, number of pairs, and the metrics of rewards.
    """
    delta_P = chosen_P - rejected_P
    loss_P = -F.logsigmoid(delta_P if margin_P is None else delta_P - margin_P)
    if centering != 0:
        loss_P = loss_P + centering * (chosen_P + rejected_P).square()
    return pair_loss(loss_P, weight_P, reward_metrics(chosen_P, rejected_P))


def _with_nll(policy: PairLogps, loss: Loss, weight: float) -> Loss:
    if weight == 0:
        return loss
    return combine(loss, (weight, token_nll(policy)))


def _alpha_reward(mean_P: Tensor, alpha: float) -> Tensor:
    return mean_P if alpha == 0 else -torch.expm1(-alpha * mean_P) / alpha


def _log_odds(mean_P: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^mean, stable at both ends; a likelihood above 1 - 1e-6 counts as that, which keeps it finite."""
    mean_P = mean_P.float() if mean_P.dtype.itemsize < 4 else mean_P
    bounded_P = mean_P.clamp(max=-1e-6)
    log_rest_P = torch.where(bounded_P > -math.log(2), torch.log(-torch.expm1(bounded_P)), torch.log1p(-torch.exp(bounded_P)))
    return mean_P - log_rest_P
