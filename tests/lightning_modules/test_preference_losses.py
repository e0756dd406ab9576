"""What holds of the losses by their equations; tests/parity compares them with TRL. P pairs, S tokens."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from preference_fixtures import PAIRS_P2, identical_pairs, random_answers, random_pairs, swapped

from lightning_modules.dpo_kinds import KINDS, DPOKind, DPOOptions, diverge
from lightning_modules.pair_logps import PairLogps, mean, pair_logps
from lightning_modules.preference_losses import anchor, dpo, media_preference

LN2 = math.log(2)
EPSILON = 1e-3
VALUE_AT_REFERENCE = {
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "hinge": 1,
    "ipo": 25,
    "exo_pair": -LN2 - 0.5 * (math.log(1 - EPSILON) + math.log(EPSILON)),
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 50,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1,
    "apo_down": 1,
    "discopop": 0.5 * LN2 + 0.5,
}
ON_DIFFERENCE: list[DPOKind] = [
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "aot",
    "aot_unpaired",
]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(41)


def options_for(kind: DPOKind) -> DPOOptions:
    return DPOOptions(label_smoothing=EPSILON if kind == "exo_pair" else 0.0)


def policy_as_reference(policy: PairLogps) -> PairLogps:
    return replace(policy, chosen_P=policy.chosen_P.detach(), rejected_P=policy.rejected_P.detach())


class TestDPO:
    @pytest.mark.parametrize("kind", KINDS)
    def test_value_where_the_policy_is_the_reference(self, generator: torch.Generator, kind: DPOKind) -> None:
        policy, _ = random_pairs(generator)
        total, count, metrics = dpo(policy, policy, {kind: 1.0}, options_for(kind))
        assert (total / count).item() == pytest.approx(VALUE_AT_REFERENCE[kind], rel=1e-9)
        assert count.item() == 4
        assert metrics["rewards/margins"][0].tolist() == [0, 0, 0, 0]

    def test_sft_is_the_token_mean_of_the_chosen(self, generator: torch.Generator) -> None:
        answers = random_answers(generator)
        policy = pair_logps(answers, PAIRS_P2)
        total, count, _ = dpo(policy, policy, {"sft": 1.0})
        chosen_S = answers.answer_S % 2 == 0
        assert mean(total, count).item() == pytest.approx(-answers.logps_S[chosen_S].mean().item())

    @pytest.mark.parametrize("kind", [*ON_DIFFERENCE, "apo_zero"])
    def test_identical_answers_have_exactly_no_gradient(self, generator: torch.Generator, kind: DPOKind) -> None:
        theta_S = torch.randn(5, generator=generator).requires_grad_()
        reference = identical_pairs(theta_S.detach() + 0.3)
        total, _, _ = dpo(identical_pairs(theta_S), reference, {kind: 1.0}, options_for(kind))
        total.backward()
        assert torch.equal(theta_S.grad, torch.zeros(5))

    @pytest.mark.parametrize("kind", sorted({*KINDS} - {"apo_down", "discopop"}))
    def test_first_step_makes_the_chosen_likelier_and_the_rejected_less(self, generator: torch.Generator, kind: DPOKind) -> None:
        policy, _ = random_pairs(generator)
        total, _, _ = dpo(policy, policy_as_reference(policy), {kind: 1.0}, options_for(kind))
        slope_c_P, slope_r_P = torch.autograd.grad(total, (policy.chosen_P, policy.rejected_P))
        assert (slope_c_P < 0).all()
        assert (slope_r_P > 0).all()

    def test_swapped_sides_have_the_opposite_margin(self, generator: torch.Generator) -> None:
        policy, reference = random_pairs(generator)
        there, back = (dpo(p, r, {"sigmoid": 1.0})[2] for p, r in ((policy, reference), (swapped(policy), swapped(reference))))
        torch.testing.assert_close(there["rewards/margins"][0], -back["rewards/margins"][0])
        assert torch.equal(there["rewards/accuracies"][0], 1 - back["rewards/accuracies"][0])
        torch.testing.assert_close(there["rewards/chosen"][0], back["rewards/rejected"][0])

    @pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
    def test_label_smoothing_is_cdpo(self, generator: torch.Generator, kind: DPOKind) -> None:
        """TRL 1.16 does not heed label_smoothing here, so it is checked against the equation."""
        policy, reference = random_pairs(generator)
        plain, _, _ = dpo(policy, reference, {kind: 1.0})
        turned, _, _ = dpo(swapped(policy), swapped(reference), {kind: 1.0})
        smoothed, _, _ = dpo(policy, reference, {kind: 1.0}, DPOOptions(label_smoothing=0.2))
        torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * turned)

    def test_robust_undoes_flipped_labels(self, generator: torch.Generator) -> None:
        """Its mean over labels that are flipped with probability e is the plain loss."""
        policy, reference = random_pairs(generator)
        options = DPOOptions(label_smoothing=0.2)
        kept, _, _ = dpo(policy, reference, {"robust": 1.0}, options)
        flipped, _, _ = dpo(swapped(policy), swapped(reference), {"robust": 1.0}, options)
        torch.testing.assert_close(0.8 * kept + 0.2 * flipped, dpo(policy, reference, {"sigmoid": 1.0})[0])

    def test_margin_moves_the_logit(self, generator: torch.Generator) -> None:
        policy, reference = random_pairs(generator)
        margin_P = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
        total, _, metrics = dpo(policy, reference, {"sigmoid": 1.0}, margin_P=margin_P)
        torch.testing.assert_close(total, -F.logsigmoid(metrics["rewards/margins"][0] - margin_P).sum())

    def test_weights_and_importance(self, generator: torch.Generator) -> None:
        policy, reference = random_pairs(generator)
        loss_P = -F.logsigmoid(dpo(policy, reference, {"sigmoid": 1.0})[2]["rewards/margins"][0])
        factor_P = torch.tensor([0.1, 1.0, 2.0, 0.0], dtype=torch.float64)
        total, count, _ = dpo(policy, reference, {"sigmoid": 1.0}, weight_P=factor_P)
        assert (total.item(), count.item()) == pytest.approx(((factor_P * loss_P).sum().item(), 3.1))
        total, count, _ = dpo(policy, reference, {"sigmoid": 1.0}, importance_P=factor_P)
        assert (total.item(), count.item()) == pytest.approx(((factor_P * loss_P).sum().item(), 4))

    def test_a_mixture_is_its_weighted_sum(self, generator: torch.Generator) -> None:
        policy, reference = random_pairs(generator)
        mpo: dict[DPOKind, float] = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
        total, count, metrics = dpo(policy, reference, mpo)
        alone = {kind: mean(*dpo(policy, reference, {kind: 1.0})[:2]) for kind in mpo}
        torch.testing.assert_close(mean(total, count), sum(weight * alone[kind] for kind, weight in mpo.items()))
        for kind in mpo:
            total_P, count_P = metrics[f"loss/{kind}"]
            torch.testing.assert_close(total_P.sum() / count_P.sum(), alone[kind].detach())

    @pytest.mark.parametrize("kind", [*KINDS, "sft"])
    def test_gradcheck(self, generator: torch.Generator, kind: DPOKind) -> None:
        answers = random_answers(generator)
        reference = pair_logps(random_answers(generator, near=answers.logps_S), PAIRS_P2)
        options = DPOOptions(label_smoothing=0.1 if kind == "exo_pair" else 0.0, beta=0.3)

        def loss(logps_S: torch.Tensor) -> torch.Tensor:
            policy = pair_logps(type(answers)(logps_S, answers.answer_S, answers.num_answers), PAIRS_P2, ld_alpha=0.5)
            return dpo(policy, reference, {kind: 1.0}, options)[0]

        assert torch.autograd.gradcheck(loss, answers.logps_S)

    @pytest.mark.parametrize(
        ("kinds", "options", "pairs_have", "message"),
        [
            ({}, {}, (), "at least one"),
            ({"sigmoids": 1.0}, {}, (), "no kind sigmoids"),
            ({"exo_pair": 1.0}, {}, (), "0.001"),
            ({"hinge": 1.0, "sft": 1.0}, {"label_smoothing": 0.1}, (), "means nothing to hinge, sft"),
            ({"nca_pair": 1.0}, {"divergence": "js"}, (), "divergence js means nothing"),
            ({"aot": 1.0}, {}, ("weight_P",), "aot sorts"),
            ({"aot_unpaired": 1.0}, {}, ("importance_P",), "aot_unpaired sorts"),
            ({"sigmoid": 1.0, "apo_zero": 1.0}, {}, ("margin_P",), "apo_zero has no place for a margin"),
        ],
    )
    def test_what_a_kind_would_not_heed_is_refused(
        self, generator: torch.Generator, kinds: dict, options: dict, pairs_have: tuple[str, ...], message: str
    ) -> None:
        policy, reference = random_pairs(generator)
        with pytest.raises(ValueError, match=message):
            dpo(policy, reference, kinds, DPOOptions(**options), **dict.fromkeys(pairs_have, torch.ones(4)))

    @pytest.mark.parametrize("options", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"discopop_tau": 0.0}])
    def test_options_outside_their_range_are_refused(self, options: dict) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            DPOOptions(**options)


class TestDivergences:
    @pytest.mark.parametrize(
        ("options", "value"),
        [
            ({}, 0.7),
            ({"divergence": "forward_kl"}, 1 - math.exp(-0.7)),
            ({"divergence": "js"}, math.log(2 * math.exp(0.7) / (1 + math.exp(0.7)))),
            ({"divergence": "alpha", "divergence_alpha": 0.5}, 2 * (1 - math.exp(-0.35))),
            ({"divergence": "alpha", "divergence_alpha": 2.0}, math.exp(0.7) - 1),
            ({"divergence": "alpha", "divergence_alpha": 1.0}, 0.7),
        ],
    )
    def test_values(self, options: dict, value: float) -> None:
        assert diverge(torch.tensor(0.7, dtype=torch.float64), DPOOptions(**options)).item() == pytest.approx(value)

    def test_a_large_ratio_stays_finite(self) -> None:
        ratio = torch.tensor(1e4, requires_grad=True)
        value = diverge(ratio, DPOOptions(divergence="alpha", divergence_alpha=2.0))
        value.backward()
        assert value.isfinite()
        assert ratio.grad.isfinite()


class TestMDPO:
    def test_conditional_term(self, generator: torch.Generator) -> None:
        policy, reference = random_pairs(generator)
        total, count, metrics = media_preference(policy, reference, beta=0.2)
        plain, plain_count, plain_metrics = dpo(policy, reference, {"sigmoid": 1.0}, DPOOptions(beta=0.2))
        torch.testing.assert_close(total, plain)
        assert count == plain_count
        assert torch.equal(metrics["rewards/corrupted"][0], plain_metrics["rewards/rejected"][0])
        assert torch.equal(metrics["rewards/media_margins"][0], plain_metrics["rewards/margins"][0])

    def test_media_that_do_not_matter_give_no_gradient(self, generator: torch.Generator) -> None:
        theta_S = torch.randn(5, generator=generator).requires_grad_()
        media_preference(identical_pairs(theta_S), identical_pairs(theta_S.detach()))[0].backward()
        assert torch.equal(theta_S.grad, torch.zeros(5))

    def test_anchor_lifts_the_chosen_alone(self, generator: torch.Generator) -> None:
        policy, reference = random_pairs(generator)
        total, count, _ = anchor(policy, reference, beta=0.2, delta=0.5)
        reward_P = 0.2 * (policy.chosen_P - reference.chosen_P)
        assert total.item() == pytest.approx(sum(math.log1p(math.exp(0.5 - r)) for r in reward_P.tolist()))
        assert count.item() == 4
        slope_c_P, slope_r_P = torch.autograd.grad(total, (policy.chosen_P, policy.rejected_P), allow_unused=True)
        assert (slope_c_P < 0).all()
        assert slope_r_P is None
