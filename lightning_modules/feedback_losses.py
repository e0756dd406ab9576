"""Losses over single answers that are desirable or not: KTO and its unpaired relative of APO.

Shape suffixes: A answers, K mismatched answers.
"""

from typing import Literal

import torch
from torch import Tensor

from lightning_modules.pair_logps import Loss, Metrics

FeedbackKind = Literal["kto", "apo_zero_unpaired"]


@torch.no_grad()
def mismatched_kl(policy_K: Tensor, reference_K: Tensor) -> tuple[Tensor, Tensor]:
    """What KTO's reference point is the mean of: log-ratios of answers to other rows, total and number, without gradients.

    Totals and numbers add up over processes; `kto` takes their quotient.

    Args:
        policy_K: The policy's log-probability of each mismatched answer, behind the prompt and media of the row it is put to.
        reference_K: The same under the reference.
    """
    return (policy_K - reference_K).sum(), policy_K.new_tensor(float(len(policy_K)))


def kto(
    policy_A: Tensor,
    reference_A: Tensor,
    desirable_A: Tensor,
    kl: Tensor,
    kind: FeedbackKind = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weight_A: Tensor | None = None,
) -> Loss:
    """KTO (arXiv 2402.01306, equation 7), of answers that are desirable or not.

    With r = s - s', the log-ratio of the whole answer, and z = max(0, kl): a desirable answer has
    desirable_weight (1 - sigmoid(beta (r - z))), another undesirable_weight (1 - sigmoid(beta (z - r))). `apo_zero_unpaired`
    has z = 0 (APO, arXiv 2408.06266, equation 7, unpaired).

    Args:
        policy_A: The policy's log-probability of each answer.
        reference_A: The same under the reference.
        desirable_A: Which answers are desirable.
        kl: Mean of `mismatched_kl`, over all processes.
        kind: Which loss.
        beta: How dear it is to leave the reference.
        desirable_weight: Weight of desirable answers. The paper wants its product with their number between 1 and 4/3 of
            that of the undesirable ones.
        undesirable_weight: Weight of undesirable answers.
        weight_A: Weight of each answer in the mean; None: 1.

    Returns:
        Sum, number of answers, and TRL's metrics, where an answer counts for its own side only. TRL's `rewards/margins` is the
        mean of `rewards/chosen` less that of `rewards/rejected`.
    """
    log_ratio_A = policy_A - reference_A
    baseline = kl.detach().clamp(min=0) if kind == "kto" else torch.zeros_like(kl)
    sign_A = torch.where(desirable_A, 1.0, -1.0).to(log_ratio_A.dtype)
    side_weight_A = torch.where(desirable_A, desirable_weight, undesirable_weight).to(log_ratio_A.dtype)
    loss_A = side_weight_A * torch.sigmoid(-beta * sign_A * (log_ratio_A - baseline))
    weight_A = torch.ones_like(loss_A) if weight_A is None else weight_A
    with torch.no_grad():
        metrics: Metrics = {}
        for side, is_side_A in (("chosen", desirable_A), ("rejected", ~desirable_A)):
            count_A = is_side_A.to(log_ratio_A.dtype)
            metrics[f"rewards/{side}"] = beta * log_ratio_A.detach() * count_A, count_A
            metrics[f"logps/{side}"] = policy_A.detach() * count_A, count_A
        if kind == "kto":
            metrics["kl"] = baseline.expand_as(policy_A), torch.ones_like(policy_A)
    return (weight_A * loss_A).sum(), weight_A.sum(), metrics
