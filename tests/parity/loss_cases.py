"""The losses that are compared with TRL, their options, and the answers that they are computed on.

Shape suffixes: S tokens, A answers, P pairs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.dpo_kinds import DPOOptions
from lightning_modules.feedback_losses import kto
from lightning_modules.logprobs import AnswerLogps
from lightning_modules.pair_logps import Loss, pair_logps, wpo_importance
from lightning_modules.preference_losses import dpo
from lightning_modules.reference_free_losses import bradley_terry, cpo, orpo, simpo

GOLDEN = Path(__file__).parent / "golden_losses.json"
LENGTHS = [4, 1, 6, 3, 2, 5, 6, 3]
"""Tokens of four chosen answers, then of four rejected ones."""
PAIRS_P2 = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
DESIRABLE_A = torch.tensor([True, False, False, True, True, False, True, True])


@dataclass(frozen=True)
class Inputs:
    """What losses are computed on.

    Args:
        policy_S: Log-probability of each token under the policy.
        reference_S: The same under the reference.
        log_square_S: log sum p^2 of each position under the policy.
        mismatched_policy_A: Log-probability of KTO's mismatched answers under the policy.
        mismatched_reference_A: The same under the reference.
        margin_P: Margins of the reward model.
    """

    policy_S: Tensor
    reference_S: Tensor
    log_square_S: Tensor
    mismatched_policy_A: Tensor
    mismatched_reference_A: Tensor
    margin_P: Tensor

    def answers(self, logps_S: Tensor) -> AnswerLogps:
        """These log-probabilities by answer."""
        return AnswerLogps(logps_S, torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)), len(LENGTHS))


@dataclass(frozen=True)
class Case:
    """A loss and its options, in our names; those of DPO are `kinds`, `ld_alpha`, `wpo`, and those of `DPOOptions`."""

    loss: str
    options: dict[str, Any] = field(default_factory=dict)


def _dpo(*kinds: str, **options: Any) -> Case:
    weights = options.pop("weights", [1.0] * len(kinds))
    return Case("dpo", {"kinds": dict(zip(kinds, weights, strict=True))} | options)


CASES: dict[str, Case] = {
    **{kind: _dpo(kind) for kind in ("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot")},
    **{kind: _dpo(kind) for kind in ("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")},
    "exo_pair": _dpo("exo_pair", label_smoothing=1e-3),
    "sigmoid beta": _dpo("sigmoid", beta=0.7),
    "exo_pair smoothed": _dpo("exo_pair", label_smoothing=0.2, beta=0.5),
    "robust smoothed": _dpo("robust", label_smoothing=0.2, beta=0.5),
    "aot smoothed": _dpo("aot", label_smoothing=0.2, beta=0.5),
    "aot_unpaired smoothed": _dpo("aot_unpaired", label_smoothing=0.2, beta=0.5),
    "discopop tau": _dpo("discopop", discopop_tau=0.2, beta=0.5),
    "mpo": _dpo("sigmoid", "bco_pair", "sft", weights=[0.8, 0.2, 1.0]),
    "rpo": _dpo("sigmoid", "sft", weights=[1.0, 0.3]),
    "ld": _dpo("sigmoid", ld_alpha=0.3),
    "ld ipo": _dpo("ipo", ld_alpha=0.0),
    "ld mpo": _dpo("sigmoid", "bco_pair", "sft", weights=[0.8, 0.2, 1.0], ld_alpha=0.6),
    "wpo": _dpo("sigmoid", wpo=True),
    "wpo ipo": _dpo("ipo", wpo=True),
    "forward_kl": _dpo("sigmoid", divergence="forward_kl"),
    "forward_kl ipo": _dpo("ipo", divergence="forward_kl"),
    "js": _dpo("sigmoid", divergence="js"),
    "js sigmoid_norm": _dpo("sigmoid_norm", divergence="js", beta=2.0),
    "alpha": _dpo("sigmoid", divergence="alpha", divergence_alpha=0.5),
    "alpha hinge": _dpo("hinge", divergence="alpha", divergence_alpha=1.5),
    "alpha of one": _dpo("sigmoid", divergence="alpha", divergence_alpha=1.0),
    "kto": Case("kto"),
    "kto weighted": Case("kto", {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7}),
    "apo_zero_unpaired": Case("kto", {"kind": "apo_zero_unpaired", "beta": 0.3}),
    "cpo": Case("cpo", {"nll_weight": 1.0}),
    "cpo smoothed": Case("cpo", {"label_smoothing": 0.1, "beta": 0.3, "nll_weight": 0.0}),
    "cpo hinge": Case("cpo", {"kind": "hinge", "nll_weight": 0.5}),
    "cpo ipo": Case("cpo", {"kind": "ipo", "nll_weight": 1.0}),
    "simpo": Case("simpo", {"beta": 2.0, "gamma": 1.0}),
    "simpo smoothed nll": Case("simpo", {"beta": 2.5, "gamma": 0.5, "label_smoothing": 0.1, "nll_weight": 1.0}),
    "alphapo": Case("simpo", {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}),
    "orpo": Case("orpo", {"beta": 0.1}),
    "reward": Case("reward"),
    "reward margin centred": Case("reward", {"margin": True, "centering": 0.01}),
}


def our_loss(case: Case, inputs: Inputs, policy_S: Tensor) -> Loss:
    """The case as this repository computes it. The reward model's rewards are the sums of `policy_S` by answer."""
    answers = inputs.answers(policy_S)
    options = dict(case.options)
    if case.loss == "kto":
        kl = (inputs.mismatched_policy_A - inputs.mismatched_reference_A).mean()
        return kto(answers.sums(), inputs.answers(inputs.reference_S).sums(), DESIRABLE_A, kl, **options)
    if case.loss == "reward":
        sums_A = answers.sums()
        margin_P = inputs.margin_P if options.pop("margin", False) else None
        return bradley_terry(sums_A[PAIRS_P2[:, 0]], sums_A[PAIRS_P2[:, 1]], margin_P, **options)
    if case.loss == "dpo":
        ld_alpha, kinds = options.pop("ld_alpha", 1.0), options.pop("kinds")
        importance_P = wpo_importance(answers, inputs.log_square_S, PAIRS_P2) if options.pop("wpo", False) else None
        policy, reference = (pair_logps(a, PAIRS_P2, ld_alpha) for a in (answers, inputs.answers(inputs.reference_S)))
        return dpo(policy, reference, kinds, DPOOptions(**options), importance_P=importance_P)
    losses: dict[str, Callable[..., Loss]] = {"cpo": cpo, "simpo": simpo, "orpo": orpo}
    return losses[case.loss](pair_logps(answers, PAIRS_P2), **options)


def random_inputs(seed: int) -> Inputs:
    """Answers whose log-ratios lie some nats about 0."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    policy_S = -3 * torch.rand(total, generator=generator) - 0.05
    reference_S = policy_S + 0.8 * torch.randn(total, generator=generator)
    log_square_S = -2 * torch.rand(total, generator=generator)
    policy_A, reference_A = (-10 * torch.rand(len(LENGTHS), generator=generator) + shift for shift in (1.0, 0.0))
    return Inputs(policy_S, reference_S, log_square_S, policy_A, reference_A, torch.rand(len(PAIRS_P2), generator=generator))


def read_golden() -> tuple[Inputs, dict[str, dict[str, Any]]]:
    """The inputs of the file and, by case, TRL's `loss`, `gradient` for `policy_S`, and `metrics`."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return Inputs(**{name: torch.tensor(values) for name, values in golden["inputs"].items()}), golden["cases"]


def metric_means(loss: Loss) -> dict[str, float]:
    """The means of a loss's metrics."""
    return {name: (total.sum() / count.sum()).item() for name, (total, count) in loss[2].items()}
