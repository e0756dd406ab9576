"""The kinds of DPO: a table of functions, each with its equation.

With s the policy's log-probability of a whole answer, s' the reference's, and n an answer's tokens, of the chosen answer (c) and
the rejected one (r):  a = s_c - s'_c,  b = s_r - s'_r,  d = g(a) - g(b) with the divergence's g,  z = beta * d - margin.

Shape suffixes: P pairs.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.pair_logps import PairLogps, smoothed_logistic

DPOKind = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True)
class DPOOptions:
    """The numbers of DPO's kinds.

    Args:
        beta: How dear it is to leave the reference.
        label_smoothing: Probability that the label of a pair is wrong; for sigmoid, sigmoid_norm, exo_pair, robust, aot
            and aot_unpaired.
        divergence: Replaces the log-ratio u by g(u) (f-DPO, arXiv 2309.16240): reverse_kl u; forward_kl 1 - e^-u;
            js log 2 + log sigmoid(u); alpha (e^((alpha - 1) u) - 1) / (alpha - 1).
        divergence_alpha: alpha of the alpha-divergence; 1 is reverse_kl.
        discopop_tau: Temperature at which discopop mixes its two losses.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: Divergence = "reverse_kl"
    divergence_alpha: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is the probability of a wrong label, in [0, 0.5), got {self.label_smoothing}")
        if self.discopop_tau <= 0:
            raise ValueError(f"discopop_tau is a temperature and must be above 0, got {self.discopop_tau}")


@dataclass(frozen=True)
class PairRatios:
    """What the kinds are made of.

    Args:
        policy: Log-probabilities under the policy.
        reference: The same under the reference.
        options: beta and the others.
        chosen_P: a.
        rejected_P: b.
        delta_P: d.
        normalized_delta_P: g(a) / n_c - g(b) / n_r.
        margin_P: By how much beta * d is to exceed 0; None: 0.
    """

    policy: PairLogps
    reference: PairLogps
    options: DPOOptions
    chosen_P: Tensor
    rejected_P: Tensor
    delta_P: Tensor
    normalized_delta_P: Tensor
    margin_P: Tensor | None

    def logits(self) -> Tensor:
        """z of each pair."""
        return self.with_margin(self.delta_P)

    def with_margin(self, delta_P: Tensor) -> Tensor:
        """beta * delta - margin."""
        logits_P = self.options.beta * delta_P
        return logits_P if self.margin_P is None else logits_P - self.margin_P


def pair_ratios(policy: PairLogps, reference: PairLogps, options: DPOOptions, margin_P: Tensor | None = None) -> PairRatios:
    """Compares the two answers of each pair under the policy and under the reference. Arguments as in `PairRatios`."""
    chosen_P, rejected_P = policy.chosen_P - reference.chosen_P, policy.rejected_P - reference.rejected_P
    score_c_P, score_r_P = diverge(chosen_P, options), diverge(rejected_P, options)
    normalized_P = score_c_P / policy.chosen_count_P.clamp(min=1) - score_r_P / policy.rejected_count_P.clamp(min=1)
    return PairRatios(policy, reference, options, chosen_P, rejected_P, score_c_P - score_r_P, normalized_P, margin_P)


def diverge(ratio_P: Tensor, options: DPOOptions) -> Tensor:
    """g of a log-ratio, with g(log t) = f'(t) up to a constant (f-DPO, arXiv 2309.16240)."""
    if options.divergence == "forward_kl":
        return 1 - torch.exp(-ratio_P)
    if options.divergence == "js":
        return math.log(2) + F.logsigmoid(ratio_P)
    if options.divergence == "alpha" and abs(options.divergence_alpha - 1) >= 1e-6:
        power = options.divergence_alpha - 1
        return torch.expm1((power * ratio_P).clamp(max=80.0)) / power  # e^80 is finite in float32
    return ratio_P


def check_kinds(kinds: Mapping[DPOKind, float], options: DPOOptions, weighted: bool = False, margins: bool = False) -> None:
    """Refuses options that a loss would not heed.

    Raises:
        ValueError: There is no kind, or an option or a weight of pairs has no meaning for any, or for one, of the kinds.
    """
    names = ", ".join(kinds)
    if not kinds:
        raise ValueError("no kind of loss: expected at least one, such as {sigmoid: 1.0}")
    if unknown := set(kinds) - set(get_args(DPOKind)):
        raise ValueError(f"there is no kind {', '.join(sorted(unknown))}: expected some of {', '.join(get_args(DPOKind))}")
    if "exo_pair" in kinds and options.label_smoothing == 0:
        raise ValueError("exo_pair divides by label_smoothing, got 0: set it above 0; its paper has 0.001")
    if options.label_smoothing > 0 and not _SMOOTHED & set(kinds):
        raise ValueError(f"label_smoothing {options.label_smoothing} means nothing to {names}: set it to 0")
    if options.divergence != "reverse_kl" and not _DIVERGING & set(kinds):
        raise ValueError(f"divergence {options.divergence} means nothing to {names}: leave it at reverse_kl")
    if weighted and (sorting := {"aot", "aot_unpaired"} & set(kinds)):
        raise ValueError(
            f"{', '.join(sorted(sorting))} sorts the pairs of a batch, so a pair has no loss to weight: use no weights"
        )
    if margins and (without := set(kinds) - _WITH_MARGIN):
        raise ValueError(
            f"{', '.join(sorted(without))} has no place for a margin: expected some of {', '.join(sorted(_WITH_MARGIN))}"
        )


def _sigmoid(pairs: PairRatios) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z); with label smoothing e this is cDPO."""
    return smoothed_logistic(pairs.logits(), pairs.options.label_smoothing)


def _sigmoid_norm(pairs: PairRatios) -> Tensor:
    """The same with z = beta (g(a) / n_c - g(b) / n_r) (length-normalised DPO; Tulu 3, arXiv 2411.15124)."""
    return smoothed_logistic(pairs.with_margin(pairs.normalized_delta_P), pairs.options.label_smoothing)


def _hinge(pairs: PairRatios) -> Tensor:
    """max(0, 1 - z) (RSO, arXiv 2309.06657; SLiC, arXiv 2305.10425)."""
    return torch.relu(1 - pairs.logits())


def _ipo(pairs: PairRatios) -> Tensor:
    """(g(a) / n_c - g(b) / n_r - 1 / (2 beta))^2, the mean of tokens as its authors have it (arXiv 2310.12036, equation 17)."""
    return (pairs.normalized_delta_P - 1 / (2 * pairs.options.beta)).square()


def _exo_pair(pairs: PairRatios) -> Tensor:
    """KL((sigmoid(z), sigmoid(-z)) || (1 - e, e)) (EXO, arXiv 2402.00856, equation 16 for two answers)."""
    logits_P, smoothing = pairs.logits(), pairs.options.label_smoothing
    chosen_P = logits_P.sigmoid() * (F.logsigmoid(logits_P) - math.log1p(-smoothing))
    return chosen_P + (-logits_P).sigmoid() * (F.logsigmoid(-logits_P) - math.log(smoothing))


def _robust(pairs: PairRatios) -> Tensor:
    """(-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e): unbiased under labels flipped with e (arXiv 2403.00409)."""
    smoothing = pairs.options.label_smoothing
    kept_P, flipped_P = -F.logsigmoid(pairs.logits()), -F.logsigmoid(-pairs.logits())
    return ((1 - smoothing) * kept_P - smoothing * flipped_P) / (1 - 2 * smoothing)


def _discopop(pairs: PairRatios) -> Tensor:
    """-(1 - q) log sigmoid(z) + q e^-z, q = sigmoid(z / tau) (DiscoPOP, arXiv 2406.08414, equation 5)."""
    logits_P = pairs.logits()
    exponential_P = torch.sigmoid(logits_P / pairs.options.discopop_tau)
    return (1 - exponential_P) * -F.logsigmoid(logits_P) + exponential_P * torch.exp(-logits_P)


def _nca_pair(pairs: PairRatios) -> Tensor:
    """-log sigmoid(beta a) - log sigmoid(-beta a) / 2 - log sigmoid(-beta b) / 2 (NCA, arXiv 2402.05369)."""
    chosen_P, rejected_P = pairs.options.beta * pairs.chosen_P, pairs.options.beta * pairs.rejected_P
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


def _bco_pair(pairs: PairRatios) -> Tensor:
    """-log sigmoid(beta a) - log sigmoid(-beta b) (BCO, arXiv 2404.04656, without its running shift)."""
    return -F.logsigmoid(pairs.options.beta * pairs.chosen_P) - F.logsigmoid(-pairs.options.beta * pairs.rejected_P)


def _sppo_hard(pairs: PairRatios) -> Tensor:
    """(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2 (SPPO, arXiv 2405.00675, equation 4.7 with probabilities 1 and 0)."""
    half = 0.5 / pairs.options.beta
    return (pairs.chosen_P - half).square() + (pairs.rejected_P + half).square()


def _apo_zero(pairs: PairRatios) -> Tensor:
    """1 - sigmoid(beta a) + sigmoid(beta b), for chosen answers above the model's own (APO, arXiv 2408.06266, equation 7)."""
    return torch.sigmoid(-pairs.options.beta * pairs.chosen_P) + torch.sigmoid(pairs.options.beta * pairs.rejected_P)


def _apo_down(pairs: PairRatios) -> Tensor:
    """sigmoid(beta a) + 1 - sigmoid(beta (a - b)), for chosen answers below them (APO, arXiv 2408.06266, equation 8)."""
    beta, chosen_P = pairs.options.beta, pairs.chosen_P
    return torch.sigmoid(beta * chosen_P) + torch.sigmoid(beta * (pairs.rejected_P - chosen_P))


def _aot(pairs: PairRatios) -> Tensor:
    """Smoothed -log sigmoid(beta (sort(s_c - s_r) - sort(s'_c - s'_r))), sorted over the batch (AOT, arXiv 2406.05882)."""
    policy, reference = (logps.chosen_P - logps.rejected_P for logps in (pairs.policy, pairs.reference))
    delta_P = policy.sort().values - reference.sort().values
    return smoothed_logistic(pairs.options.beta * delta_P, pairs.options.label_smoothing)


def _aot_unpaired(pairs: PairRatios) -> Tensor:
    """Smoothed -log sigmoid(beta (sort(a) - sort(b))), sorted over the batch (AOT, arXiv 2406.05882)."""
    delta_P = pairs.chosen_P.sort().values - pairs.rejected_P.sort().values
    return smoothed_logistic(pairs.options.beta * delta_P, pairs.options.label_smoothing)


KINDS: dict[DPOKind, Callable[[PairRatios], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}
"""All but `sft`, whose mean is one of tokens: see `preference_losses.dpo`."""
_WITH_MARGIN: set[DPOKind] = {"sigmoid", "sigmoid_norm", "hinge", "exo_pair", "robust", "discopop"}
_DIVERGING: set[DPOKind] = _WITH_MARGIN | {"ipo"}
_SMOOTHED: set[DPOKind] = {"sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired"}
