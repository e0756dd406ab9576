"""TRL's losses, called on log-probabilities: its trainers' own methods, around a model that answers with given numbers.

Needs requirements-parity.txt. Shape suffixes: S tokens, A answers, P pairs, T positions, V vocabulary, 1 one.
"""

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from accelerate import Accelerator
from loss_cases import DESIRABLE_A, LENGTHS, PAIRS_P2, Case, Inputs
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}


def trl_loss(case: Case, inputs: Inputs, policy_S: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of a case as TRL computes them."""
    call = {"dpo": _dpo, "kto": _kto, "cpo": _cpo, "simpo": _cpo, "orpo": _orpo, "reward": _reward}[case.loss]
    return call(case, inputs, policy_S)


def _padded(values_S: Tensor) -> Tensor:
    """values_S by answer: one prompt token stands before each, so position t predicts token t + 1."""
    rows = [torch.nn.functional.pad(row, (0, max(LENGTHS) - len(row))) for row in values_S.split(LENGTHS)]
    return torch.stack(rows)


class _Model(torch.nn.Module):
    """Answers with given numbers."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, log_square: Tensor) -> None:
        super().__init__()
        zeros = torch.zeros_like(log_probs)
        self.outputs = SimpleNamespace(
            log_probs=log_probs, log_sum_sq_probs=log_square, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    def forward(self, **arguments: Any) -> Any:
        return self.outputs


def _trainer(inputs: Inputs, policy_S: Tensor, **options: Any) -> Any:
    return SimpleNamespace(
        model=_Model(_padded(policy_S), _padded(inputs.log_square_S)),
        ref_model=_Model(_padded(inputs.reference_S), _padded(inputs.log_square_S)),
        accelerator=Accelerator(cpu=True),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )


def _batch() -> dict[str, Tensor]:
    mask_AT = _padded(torch.ones(sum(LENGTHS), dtype=torch.long))
    mask_AT = torch.nn.functional.pad(mask_AT, (1, 0))
    return {"input_ids": torch.zeros_like(mask_AT), "attention_mask": torch.ones_like(mask_AT), "completion_mask": mask_AT}


def _logged(trainer: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _dpo(case: Case, inputs: Inputs, policy_S: Tensor) -> tuple[Tensor, dict[str, float]]:
    options = {"beta": 0.1, "label_smoothing": 0.0, "divergence": "reverse_kl", "divergence_alpha": 0.5} | case.options
    trainer = _trainer(
        inputs,
        policy_S,
        ld_alpha=options.get("ld_alpha"),
        loss_types=list(options["kinds"]),
        loss_weights=list(options["kinds"].values()),
        beta=options["beta"],
        label_smoothing=options["label_smoothing"],
        f_divergence_type=DIVERGENCES.get(options["divergence"], options["divergence"]),
        f_alpha_divergence_coef=options["divergence_alpha"],
        use_weighting=options.get("wpo", False),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.get("discopop_tau", 0.05)),
    )
    return DPOTrainer._compute_loss(trainer, trainer.model, _batch(), False), _logged(trainer)


def _kto(case: Case, inputs: Inputs, policy_S: Tensor) -> tuple[Tensor, dict[str, float]]:
    options = {"kind": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0} | case.options
    trainer = _trainer(
        inputs,
        policy_S,
        beta=options["beta"],
        loss_type=options["kind"],
        calculate_KL=options["kind"] == "kto",
        desirable_weight=options["desirable_weight"],
        undesirable_weight=options["undesirable_weight"],
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    mismatched = {id(trainer.model): inputs.mismatched_policy_A, id(trainer.ref_model): inputs.mismatched_reference_A}
    trainer._compute_kl_logps = lambda model, batch: mismatched[id(model)]
    return KTOTrainer._compute_loss(trainer, trainer.model, _batch() | {"label": DESIRABLE_A}, False), _logged(trainer)


def _reference_free(inputs: Inputs, policy_S: Tensor, normalized: bool, with_nll: bool) -> tuple[Tensor, ...]:
    """What TRL's `concatenated_forward` hands to its losses."""
    sums_A = torch.stack([row.sum() for row in policy_S.split(LENGTHS)])
    logps_A = sums_A / torch.tensor(LENGTHS) if normalized else sums_A
    chosen_S = policy_S[: sum(LENGTHS[: len(PAIRS_P2)])]
    nll = -chosen_S.mean() if with_nll else torch.tensor(0.0)
    return *(logps_A[answers_P] for answers_P in PAIRS_P2.T), torch.zeros(1), torch.zeros(1), nll


def _cpo(case: Case, inputs: Inputs, policy_S: Tensor) -> tuple[Tensor, dict[str, float]]:
    options = {"beta": 0.1, "kind": "sigmoid", "gamma": 0.0, "alpha": 0.0, "label_smoothing": 0.0, "nll_weight": 0.0}
    options |= {"kind": "simpo"} if case.loss == "simpo" else {}
    options |= case.options
    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        aux_loss_enabled=False,
        beta=options["beta"],
        alpha=options["alpha"],
        loss_type=options["kind"],
        simpo_gamma=options["gamma"],
        label_smoothing=options["label_smoothing"],
        cpo_alpha=options["nll_weight"],
    )
    forward = _reference_free(inputs, policy_S, options["kind"] in ("ipo", "simpo"), options["nll_weight"] != 0)
    trainer.concatenated_forward = lambda model, batch: forward
    trainer.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)
    return CPOTrainer.get_batch_loss_metrics(trainer, None, {})


def _orpo(case: Case, inputs: Inputs, policy_S: Tensor) -> tuple[Tensor, dict[str, float]]:
    """With the likelihood of the answer alone, where TRL's own forward takes that of the prompt too."""
    trainer = SimpleNamespace(accelerator=Accelerator(cpu=True), aux_loss_enabled=False, beta=case.options["beta"])
    trainer.concatenated_forward = lambda model, batch: _reference_free(inputs, policy_S, True, True)
    trainer.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(trainer, *logps)
    return ORPOTrainer.get_batch_loss_metrics(trainer, None, {})


def _reward(case: Case, inputs: Inputs, policy_S: Tensor) -> tuple[Tensor, dict[str, float]]:
    options = {"centering": None, "margin": False} | case.options
    trainer = _trainer(inputs, policy_S, args=SimpleNamespace(center_rewards_coefficient=options["centering"]))
    rewards_A1 = torch.stack([row.sum() for row in policy_S.split(LENGTHS)]).unsqueeze(1)
    batch = {"attention_mask": torch.ones(len(LENGTHS), 1)} | ({"margin": inputs.margin_P} if options["margin"] else {})
    loss = RewardTrainer.compute_loss(trainer, lambda **arguments: SimpleNamespace(logits=rewards_A1), batch)
    logged = _logged(trainer)
    return loss, {"rewards/accuracies": logged["accuracy"], "rewards/margins": logged["margin"]}
