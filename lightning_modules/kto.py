"""KTO: answers that are desirable or not, each for itself.

Shape suffixes: A answers, F those with feedback, K mismatched ones.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from datamodules.answer_form import AnswerForm
from datamodules.batch import Batch
from lightning_modules.comparison import Comparison, ScoredAnswers, unscored
from lightning_modules.feedback_losses import FeedbackKind, kto, mismatched_kl
from lightning_modules.measuring import Stage
from lightning_modules.preference import ReferencedLitModule, check_numbers


class KTOLitModule(ReferencedLitModule):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306): desirable answers are to gain, undesirable ones to lose, against a point
    that is estimated from answers to other rows of the batch; so a batch must have at least two rows.

    A pair is taken as a desirable and an undesirable answer. Its learning rates are those of DPO.

    Args:
        beta: How dear it is to leave the reference.
        loss_type: `kto`, or `apo_zero_unpaired` (arXiv 2408.06266), which needs no reference point.
        desirable_weight: Weight of desirable answers. Where there are fewer of one kind, its weight is to make up for it.
        undesirable_weight: Weight of undesirable answers.
    """

    def __init__(
        self,
        *args: Any,
        beta: float = 0.1,
        loss_type: FeedbackKind = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_numbers({"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}, beta)
        self.beta = beta
        self.loss_type: FeedbackKind = loss_type
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight

    @property
    def answer_form(self) -> AnswerForm:
        return replace(super().answer_form, kind="feedback", mismatched=self.loss_type == "kto")

    def counts(self, batch: Batch) -> Tensor:
        return torch.tensor([float(len(unscored(batch).are("desirable", "undesirable").nonzero()))])

    def step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor] | None:
        result = super().step(batch, stage)
        if result is None and stage == "train" and self.loss_type == "kto":
            self._mean(torch.zeros(2, device=batch["tokens_BT"].device))  # the other processes wait for this one's
        return result

    def compare(self, scored: ScoredAnswers) -> Comparison:
        policy_A, reference_A = scored.policy.sums(), scored.against.sums()
        answer_F = (scored.are("desirable", "undesirable") & scored.counts_A).nonzero()[:, 0]
        mismatched_K = scored.are("mismatched").nonzero()[:, 0]
        loss = kto(
            policy_A[answer_F],
            reference_A[answer_F],
            scored.are("desirable")[answer_F],
            self._mean(torch.stack(mismatched_kl(policy_A[mismatched_K], reference_A[mismatched_K]))),
            self.loss_type,
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
        )
        return Comparison.of(loss, answer_F)

    def complete(self, means: dict[str, float]) -> dict[str, float]:
        """Adds `rewards/margins`, of the mean rewards, since an answer has no other that it belongs to."""
        prefixes = [name.removesuffix("rewards/chosen") for name in means if name.endswith("rewards/chosen")]
        margins = {
            f"{prefix}rewards/margins": means[f"{prefix}rewards/chosen"] - means[f"{prefix}rewards/rejected"]
            for prefix in prefixes
            if f"{prefix}rewards/rejected" in means
        }
        return means | margins

    def _mean(self, total_and_count: Tensor) -> Tensor:
        """The mean, in training over all processes: their evaluations may have other numbers of batches."""
        if self.is_lent:
            total_and_count = torch.zeros_like(total_and_count)
        if self._trainer is not None and self._trainer.training:
            total_and_count = self._trainer.strategy.reduce(total_and_count, reduce_op="sum")
        total, count = total_and_count
        return total / count.clamp(min=1)
