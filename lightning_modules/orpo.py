"""ORPO: supervised tuning and preferences in one."""

from typing import Any

from lightning_modules.comparison import Comparison, ScoredAnswers
from lightning_modules.pair_logps import pair_logps
from lightning_modules.preference import PreferenceLitModule
from lightning_modules.reference_free_losses import orpo


class ORPOLitModule(PreferenceLitModule):
    """ORPO (Hong et al. 2024, arXiv 2403.07691): the likelihood of the chosen answers, and their odds against the rejected ones.

    It takes the place of supervised tuning, from the base model on. The paper's learning rates are 5e-6 to 8e-6 for full weights.

    Args:
        odds_weight: Weight of the odds ratio beside the likelihood: the paper's lambda, TRL's beta.
    """

    def __init__(self, *args: Any, odds_weight: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if odds_weight <= 0:
            raise ValueError(f"model.odds_weight must be above 0, got {odds_weight}: without it, use MultiModalLitModule")
        self.odds_weight = odds_weight

    def compare(self, scored: ScoredAnswers) -> Comparison:
        policy = pair_logps(scored.policy, scored.pairs_P2)
        return Comparison.of(orpo(policy, self.odds_weight, scored.weights), scored.pairs_P2[:, 0])
