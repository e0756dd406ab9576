"""Direct preference optimisation.

Shape suffixes: P pairs.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from datamodules.answer_form import AnswerForm
from lightning_modules.comparison import Comparison, ScoredAnswers
from lightning_modules.dpo_kinds import Divergence, DPOKind, DPOOptions, check_kinds
from lightning_modules.logprobs import Statistic
from lightning_modules.pair_logps import pair_logps, wpo_importance
from lightning_modules.preference import ReferencedLitModule
from lightning_modules.preference_losses import dpo


class DPOLitModule(ReferencedLitModule):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290) in all its kinds: the chosen answer is to become likelier than the rejected
    one, by more than it is under the reference.

    Its learning rates are some 20 times smaller than those of supervised tuning: 5e-7 to 1e-6 for full weights, about 1e-5 for
    LoRA. The equations of the kinds are in `lightning_modules/dpo_kinds.py`.

    Args:
        beta: How dear it is to leave the reference.
        loss_type: A kind of loss, or several with their weights: MPO is {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}.
        label_smoothing: Probability that the label of a pair is wrong (cDPO), in [0, 0.5). `exo_pair` needs one: 0.001.
        ld_alpha: Weight of the tokens beyond the length that both answers have, in [0, 1] (LD-DPO, arXiv 2409.06411).
        f_divergence: What keeps the policy near the reference (f-DPO, arXiv 2309.16240).
        f_alpha: alpha of the alpha-divergence.
        discopop_tau: Temperature at which `discopop` mixes its two losses.
        use_weighting: Weigh pairs by how likely the policy itself would give their answers (WPO, arXiv 2406.11827).
        margin_weight: How much of a row's `margin` the difference of rewards is to exceed (ODPO, arXiv 2402.10571); 0: none.
    """

    def __init__(
        self,
        *args: Any,
        beta: float = 0.1,
        loss_type: DPOKind | dict[DPOKind, float] = "sigmoid",
        label_smoothing: float = 0.0,
        ld_alpha: float = 1.0,
        f_divergence: Divergence = "reverse_kl",
        f_alpha: float = 0.5,
        discopop_tau: float = 0.05,
        use_weighting: bool = False,
        margin_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.kinds: dict[DPOKind, float] = loss_type if isinstance(loss_type, dict) else {loss_type: 1.0}
        self.options = DPOOptions(beta, label_smoothing, f_divergence, f_alpha, discopop_tau)
        check_kinds(self.kinds, self.options, use_weighting, margin_weight != 0)
        if not 0 <= ld_alpha <= 1:
            raise ValueError(f"model.ld_alpha is the weight of the tokens beyond the common length, in [0, 1], got {ld_alpha}")
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self.margin_weight = margin_weight

    @property
    def answer_form(self) -> AnswerForm:
        return replace(super().answer_form, takes_margin=self.margin_weight != 0)

    @property
    def statistics(self) -> Collection[Statistic]:
        wanted: list[Statistic] = ["log_square"] if self.use_weighting else []
        return wanted

    def compare(self, scored: ScoredAnswers) -> Comparison:
        pairs_P2 = scored.pairs_P2
        importance_P = None
        if self.use_weighting:
            assert scored.tokens is not None
            importance_P = wpo_importance(scored.policy, scored.tokens.statistics["log_square"], pairs_P2)
        loss = dpo(
            pair_logps(scored.policy, pairs_P2, self.ld_alpha),
            pair_logps(scored.against, pairs_P2, self.ld_alpha),
            self.kinds,
            self.options,
            weight_P=scored.weights,
            margin_P=self.margin_weight * scored.margin_P if self.margin_weight else None,
            importance_P=importance_P,
        )
        return Comparison.of(loss, pairs_P2[:, 0])
