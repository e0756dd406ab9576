"""CPO: preferences without a reference, beside supervised tuning on the chosen answers."""

from typing import Any

from lightning_modules.comparison import Comparison, ScoredAnswers
from lightning_modules.pair_logps import pair_logps
from lightning_modules.preference import PreferenceLitModule, check_numbers
from lightning_modules.reference_free_losses import CPOKind, cpo


class CPOLitModule(PreferenceLitModule):
    """CPO (Xu et al. 2024, arXiv 2401.08417): DPO against a uniform reference, with the likelihood of the chosen answers.

    The paper's learning rate is 1e-4 with LoRA.

    Args:
        beta: Scale of the reward.
        loss_type: The kind of loss; `ipo` compares log-probabilities a token.
        label_smoothing: Probability that the label of a pair is wrong, in [0, 0.5); for `sigmoid`.
        nll_weight: Weight of the chosen answers' negative log-likelihood a token.
    """

    def __init__(
        self,
        *args: Any,
        beta: float = 0.1,
        loss_type: CPOKind = "sigmoid",
        label_smoothing: float = 0.0,
        nll_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_numbers({"nll_weight": nll_weight}, beta, label_smoothing)
        if label_smoothing > 0 and loss_type != "sigmoid":
            raise ValueError(f"model.label_smoothing is {label_smoothing}, but only the loss_type sigmoid knows it: set it to 0")
        self.beta = beta
        self.loss_type: CPOKind = loss_type
        self.label_smoothing = label_smoothing
        self.nll_weight = nll_weight

    def compare(self, scored: ScoredAnswers) -> Comparison:
        policy = pair_logps(scored.policy, scored.pairs_P2)
        loss = cpo(policy, self.loss_type, self.beta, self.label_smoothing, self.nll_weight, scored.weights)
        return Comparison.of(loss, scored.pairs_P2[:, 0])
