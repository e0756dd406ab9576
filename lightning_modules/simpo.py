"""SimPO and AlphaPO: preferences without a reference."""

from typing import Any

from lightning_modules.comparison import Comparison, ScoredAnswers
from lightning_modules.pair_logps import pair_logps
from lightning_modules.preference import PreferenceLitModule, check_numbers
from lightning_modules.reference_free_losses import simpo


class SimPOLitModule(PreferenceLitModule):
    """SimPO (Meng et al. 2024, arXiv 2405.14734): the mean log-probability of the chosen answer's tokens is to exceed that of the
    rejected one by a margin; there is no reference.

    Its learning rates are those of DPO: 3e-7 to 1e-6 for full weights. More lets the model fall apart, since nothing holds it.

    Args:
        beta: Scale of the reward, 2 to 10; the paper's runs have 2 to 2.5, later ones 10.
        gamma: By how much the chosen reward is to be larger, 0.3 to 0.8 times beta.
        alpha: Shape of the reward (AlphaPO, arXiv 2501.03884, which has 0.25); 0: SimPO.
        label_smoothing: Probability that the label of a pair is wrong, in [0, 0.5).
        nll_weight: Weight of the chosen answers' negative log-likelihood; SimPO has none.
    """

    def __init__(
        self,
        *args: Any,
        beta: float = 2.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        label_smoothing: float = 0.0,
        nll_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_numbers({"nll_weight": nll_weight}, beta, label_smoothing)
        self.beta = beta
        self.gamma = gamma
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.nll_weight = nll_weight

    def compare(self, scored: ScoredAnswers) -> Comparison:
        policy = pair_logps(scored.policy, scored.pairs_P2)
        loss = simpo(policy, self.beta, self.gamma, self.alpha, self.label_smoothing, self.nll_weight, scored.weights)
        return Comparison.of(loss, scored.pairs_P2[:, 0])
