"""Losses over pairs of answers that compare the policy with a reference: DPO in all its kinds, and mDPO's terms.

With s the policy's log-probability of a whole answer, s' the reference's, and n an answer's tokens, of the chosen answer (c) and
the rejected one (r):  a = s_c - s'_c,  b = s_r - s'_r.

Shape suffixes: P pairs.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.dpo_kinds import KINDS, DPOKind, DPOOptions, check_kinds, pair_ratios
from lightning_modules.pair_logps import (
    Loss,
    Metrics,
    PairLogps,
    combine,
    each,
    logp_metrics,
    pair_loss,
    reward_metrics,
    token_nll,
)


def dpo(
    policy: PairLogps,
    reference: PairLogps,
    kinds: Mapping[DPOKind, float],
    options: DPOOptions = DPOOptions(),
    weight_P: Tensor | None = None,
    margin_P: Tensor | None = None,
    importance_P: Tensor | None = None,
) -> Loss:
    """Direct preference optimisation (arXiv 2305.18290, equation 7), in all its kinds, or a weighted sum of several.

    MPO (arXiv 2411.10442) is {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}. Each kind's function has its equation; `sft` is
    -(sum of log-probabilities of all tokens of the chosen answers) / (their number) (RPO, arXiv 2404.19733).

    Args:
        policy: Log-probabilities under the policy.
        reference: The same under the reference; no gradients.
        kinds: Weight of each kind in the sum.
        options: beta and the others.
        weight_P: Weight of each pair in the mean; None: 1.
        margin_P: By how much beta * d is to exceed 0 (ODPO, arXiv 2402.10571); None: 0.
        importance_P: Factor of each pair's loss, from `wpo_importance`; `sft` has none. None: 1.

    Returns:
        Sum, number of pairs, and TRL's metrics; with several kinds also `loss/<kind>`. With `sft` sum and number of tokens come
        second.

    Raises:
        ValueError: From `check_kinds`.
    """
    check_kinds(kinds, options, weight_P is not None or importance_P is not None, margin_P is not None)
    pairs = pair_ratios(policy, reference, options, margin_P)
    total_P = torch.zeros_like(policy.chosen_P)
    metrics = reward_metrics(options.beta * pairs.chosen_P, options.beta * pairs.rejected_P) | logp_metrics(policy)
    for kind, weight in kinds.items():
        if kind == "sft":
            metrics |= {"loss/sft": metrics["nll_loss"]} if len(kinds) > 1 else {}
            continue
        loss_P = KINDS[kind](pairs)
        if importance_P is not None:
            loss_P = importance_P * loss_P
        if len(kinds) > 1:
            metrics[f"loss/{kind}"] = each(loss_P)
        total_P = total_P + weight * loss_P
    loss = pair_loss(total_P, weight_P, metrics)
    return combine(loss, (kinds["sft"], token_nll(policy))) if "sft" in kinds else loss


def media_preference(policy: PairLogps, reference: PairLogps, beta: float = 0.1) -> Loss:
    """mDPO's conditional term: the chosen answer is to be likelier behind its media than behind corrupted ones.

    -log sigmoid(beta (a - a')), a' the log-ratio of the same answer behind corrupted media (arXiv 2406.11839).

    Args:
        policy: `pair_logps` of `media_pairs_M2`: chosen is the answer behind its own media, rejected the corrupted one.
        reference: The same under the reference.
        beta: As in `dpo`.

    Returns:
        Sum, number of pairs of media, and how the reward depends on the media: `rewards/corrupted`, `rewards/media_margins`,
        `rewards/media_accuracies`.
    """
    chosen_P, corrupted_P = beta * (policy.chosen_P - reference.chosen_P), beta * (policy.rejected_P - reference.rejected_P)
    rewards = reward_metrics(chosen_P, corrupted_P)
    metrics: Metrics = {
        "rewards/corrupted": rewards["rewards/rejected"],
        "rewards/media_margins": rewards["rewards/margins"],
        "rewards/media_accuracies": rewards["rewards/accuracies"],
    }
    return pair_loss(-F.logsigmoid(chosen_P - corrupted_P), None, metrics)


def anchor(
    policy: PairLogps, reference: PairLogps, beta: float = 0.1, delta: float = 0.0, weight_P: Tensor | None = None
) -> Loss:
    """mDPO's anchor, which keeps the chosen answer from becoming less likely: -log sigmoid(beta a - delta).

    arXiv 2406.11839. Arguments as in `dpo`; `delta` is the reward that the chosen answer is to have.
    """
    reward_P = beta * (policy.chosen_P - reference.chosen_P)
    return pair_loss(-F.logsigmoid(reward_P - delta), weight_P, {})
