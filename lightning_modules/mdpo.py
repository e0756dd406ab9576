"""Preference optimisation that looks at the media.

Shape suffixes: P pairs, M pairs of media.
"""

from dataclasses import replace
from typing import Any

from datamodules.answer_form import AnswerForm
from datamodules.corrupt import MediaCorruption
from lightning_modules.comparison import Comparison, ScoredAnswers
from lightning_modules.dpo import DPOLitModule
from lightning_modules.pair_logps import combine, pair_logps
from lightning_modules.preference_losses import anchor, media_preference


class MDPOLitModule(DPOLitModule):
    """mDPO (Wang et al. 2024, arXiv 2406.11839): DPO, and the chosen answer is to be likelier behind its own media than behind
    corrupted ones, and no less likely than under the reference.

    DPO alone learns about as much where the pictures are left out. The corrupted media cost an encoding and a row more.

    Args:
        conditional_weight: Weight of the preference for the right media.
        anchor_weight: Weight of the anchor of the chosen answer.
        anchor_reward: Reward that the anchor wants of it.
        corruption: How media are corrupted.
    """

    def __init__(
        self,
        *args: Any,
        conditional_weight: float = 1.0,
        anchor_weight: float = 1.0,
        anchor_reward: float = 0.0,
        corruption: MediaCorruption = MediaCorruption(),  # it is frozen
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.conditional_weight = conditional_weight
        self.anchor_weight = anchor_weight
        self.anchor_reward = anchor_reward
        self.corruption = corruption

    @property
    def answer_form(self) -> AnswerForm:
        return replace(super().answer_form, corrupt_media=True, corruption=self.corruption)

    def compare(self, scored: ScoredAnswers) -> Comparison:
        compared, beta = super().compare(scored), self.options.beta
        policy, reference = (pair_logps(logps, scored.pairs_P2) for logps in (scored.policy, scored.against))
        policy_M, reference_M = (pair_logps(logps, scored.media_pairs_M2) for logps in (scored.policy, scored.against))
        total, count, metrics = media_preference(policy_M, reference_M, beta)
        total_K, count_K, _ = combine(
            (compared.total, compared.count, {}),
            (self.conditional_weight, (total, count, {})),
            (self.anchor_weight, anchor(policy, reference, beta, self.anchor_reward, scored.weights)),
        )
        return Comparison(total_K, count_K, [*compared.metrics, (metrics, scored.media_pairs_M2[:, 0])])
