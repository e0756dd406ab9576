"""What holds of the losses by their equations; tests/parity compares them with TRL. P pairs, S tokens."""

import math

import pytest
import torch
from preference_fixtures import PAIRS_P2, identical_pairs, random_answers, random_pairs, swapped

from lightning_modules.feedback_losses import kto, mismatched_kl
from lightning_modules.logprobs import AnswerLogps
from lightning_modules.pair_logps import PairLogps, mean, pair_logps, token_nll
from lightning_modules.reference_free_losses import bradley_terry, cpo, orpo, simpo

LN2 = math.log(2)
LOSSES = {
    "simpo": lambda policy: simpo(policy),
    "alphapo": lambda policy: simpo(policy, alpha=0.25),
    "cpo": lambda policy: cpo(policy, nll_weight=0.0),
    "cpo hinge": lambda policy: cpo(policy, "hinge", nll_weight=0.0),
    "cpo ipo": lambda policy: cpo(policy, "ipo", nll_weight=0.0),
    "orpo's ratio": lambda policy: (orpo(policy)[0][0],),
    "reward model": lambda policy: bradley_terry(policy.chosen_P, policy.rejected_P, torch.tensor(0.3)),
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(42)


@pytest.fixture
def policy(generator: torch.Generator) -> PairLogps:
    return random_pairs(generator)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_identical_answers_have_no_gradient(generator: torch.Generator, name: str) -> None:
    theta_S = (-torch.rand(5, generator=generator, dtype=torch.float64) - 0.1).requires_grad_()
    LOSSES[name](identical_pairs(theta_S))[0].backward()
    assert torch.equal(theta_S.grad, torch.zeros_like(theta_S))


@pytest.mark.parametrize("loss", [simpo, cpo, orpo])
def test_swapped_sides_have_the_opposite_margin(policy: PairLogps, loss) -> None:
    there, back = loss(policy)[2], loss(swapped(policy))[2]
    torch.testing.assert_close(there["rewards/margins"][0], -back["rewards/margins"][0])


class TestSimPO:
    def test_equation(self, policy: PairLogps) -> None:
        total, count, metrics = simpo(policy, beta=2.5, gamma=1.2)
        chosen_P, rejected_P = policy.means()
        expected = sum(math.log1p(math.exp(1.2 - 2.5 * d)) for d in (chosen_P - rejected_P).tolist())
        assert (total.item(), count.item()) == pytest.approx((expected, 4))
        torch.testing.assert_close(metrics["rewards/chosen"][0], 2.5 * chosen_P)
        torch.testing.assert_close(metrics["logps/chosen"][0], chosen_P)

    def test_alpha_towards_zero_is_simpo(self, policy: PairLogps) -> None:
        torch.testing.assert_close(simpo(policy, alpha=1e-7)[0], simpo(policy)[0], rtol=1e-6, atol=0)

    def test_no_likelihood_unless_asked_for(self, policy: PairLogps) -> None:
        (plain, count, _), (nll, num_tokens, _) = simpo(policy), token_nll(policy)
        total_K, count_K, _ = simpo(policy, nll_weight=0.5)
        torch.testing.assert_close(total_K, torch.stack([plain, 0.5 * nll]))
        assert count_K.tolist() == [float(count), float(num_tokens)]


class TestCPO:
    def test_unequal_answers(self, policy: PairLogps) -> None:
        total, count, metrics = cpo(policy, beta=0.2, nll_weight=0.7)
        margins = (0.2 * (policy.chosen_P - policy.rejected_P)).tolist()
        nll = float(policy.chosen_nll_P.sum() / policy.chosen_count_P.sum())
        expected = sum(math.log1p(math.exp(-m)) for m in margins) / 4 + 0.7 * nll
        assert mean(total, count).item() == pytest.approx(expected)
        assert metrics["rewards/margins"][0].tolist() == pytest.approx(margins)

    def test_equal_answers(self) -> None:
        pairs = identical_pairs(torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5]))
        values = [cpo(pairs, kind, nll_weight=0.0)[0].item() / 2 for kind in ("sigmoid", "hinge", "ipo")]
        assert values == pytest.approx([LN2, 1, 25])

    def test_smoothing_that_means_nothing_is_refused(self, policy: PairLogps) -> None:
        with pytest.raises(ValueError, match="means nothing to the kind hinge"):
            cpo(policy, "hinge", label_smoothing=0.1)


class TestORPO:
    def test_equation(self, policy: PairLogps) -> None:
        """TRL takes the likelihood of the prompt too, so the whole is checked against the equation."""
        total, count, metrics = orpo(policy, beta=0.3)
        odds_c, odds_r = ([math.exp(m) / (1 - math.exp(m)) for m in means_P.tolist()] for means_P in policy.means())
        log_odds = [math.log(c / r) for c, r in zip(odds_c, odds_r, strict=True)]
        ratio = [-math.log1p(math.exp(-x)) for x in log_odds]
        nll = (policy.chosen_nll_P.sum() / policy.chosen_count_P.sum()).item()
        assert mean(total, count).item() == pytest.approx(nll - 0.3 * sum(ratio) / 4)
        assert metrics["log_odds_ratio"][0].tolist() == pytest.approx(ratio)
        assert metrics["log_odds_chosen"][0].tolist() == pytest.approx(log_odds)

    @pytest.mark.parametrize("logp", [0.0, -1e-12, -1e-7, -1e-4, -1.0, -200.0])
    def test_certain_and_impossible_answers_stay_finite(self, logp: float) -> None:
        theta_S = torch.tensor([logp, -0.7], requires_grad=True)
        total, _, _ = orpo(pair_logps(AnswerLogps(theta_S, torch.tensor([0, 1]), 2), torch.tensor([[0, 1], [1, 0]])))
        total.sum().backward()
        assert total.isfinite().all()
        assert theta_S.grad.isfinite().all()

    def test_small_and_large_likelihoods_are_exact(self) -> None:
        means = torch.tensor([-1e-5, -0.1, -0.693, -0.6932, -3.0, -30.0])
        answers = AnswerLogps(torch.cat([means, torch.full_like(means, -0.5)]), torch.arange(12), 12)
        pairs_P2 = torch.arange(12).view(2, 6).T
        log_odds_P = orpo(pair_logps(answers, pairs_P2))[2]["log_odds_chosen"][0]
        exact = [m - math.log(-math.expm1(m)) + 0.5 + math.log(-math.expm1(-0.5)) for m in means.tolist()]
        assert log_odds_P.tolist() == pytest.approx(exact, rel=1e-6, abs=1e-6)


class TestBradleyTerry:
    def test_margin_and_centering(self) -> None:
        chosen_P, rejected_P = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])
        total, count, metrics = bradley_terry(chosen_P, rejected_P, torch.tensor([0.2, 0.0]), centering=0.01)
        expected = math.log1p(math.exp(-0.3)) + math.log1p(math.exp(2)) + 0.01 * (1.5**2 + 2**2)
        assert (total.item(), count.item()) == pytest.approx((expected, 2))
        assert metrics["rewards/accuracies"][0].tolist() == [1, 0]


class TestKTO:
    def test_equation(self, generator: torch.Generator) -> None:
        policy_A, reference_A = (torch.randn(3, generator=generator) for _ in range(2))
        desirable_A = torch.tensor([True, False, True])
        total, count, metrics = kto(
            policy_A, reference_A, desirable_A, torch.tensor(0.4), beta=0.5, desirable_weight=2.0, undesirable_weight=3.0
        )
        r = (policy_A - reference_A).tolist()
        value = [1 / (1 + math.exp(-0.5 * x)) for x in (r[0] - 0.4, 0.4 - r[1], r[2] - 0.4)]
        assert total.item() == pytest.approx(2 * (1 - value[0]) + 3 * (1 - value[1]) + 2 * (1 - value[2]))
        assert count.item() == 3
        means = {name: (total.sum() / count.sum()).item() for name, (total, count) in metrics.items()}
        assert means == pytest.approx(
            {
                "rewards/chosen": 0.5 * (r[0] + r[2]) / 2,
                "rewards/rejected": 0.5 * r[1],
                "logps/chosen": (policy_A[0] + policy_A[2]).item() / 2,
                "logps/rejected": policy_A[1].item(),
                "kl": 0.4,
            }
        )

    @pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
    def test_value_where_the_policy_is_the_reference(self, generator: torch.Generator, kind) -> None:
        policy_A = torch.randn(4, generator=generator)
        total, count, _ = kto(policy_A, policy_A, torch.tensor([True, False, False, True]), torch.tensor(0.0), kind)
        assert (total / count).item() == pytest.approx(0.5)

    def test_a_reference_point_below_zero_is_zero_and_has_no_gradient(self, generator: torch.Generator) -> None:
        policy_A, reference_A = (torch.randn(3, generator=generator) for _ in range(2))
        desirable_A, kl = torch.tensor([True, False, True]), torch.tensor(-0.3, requires_grad=True)
        below, zero, unpaired = (
            kto(policy_A.requires_grad_(), reference_A, desirable_A, z, kind)[0]
            for z, kind in ((kl, "kto"), (torch.tensor(0.0), "kto"), (torch.tensor(5.0), "apo_zero_unpaired"))
        )
        assert below == zero == unpaired
        below.backward()
        assert kl.grad is None

    def test_reference_point_adds_up(self, generator: torch.Generator) -> None:
        policy_K = torch.randn(5, generator=generator, requires_grad=True)
        reference_K = torch.randn(5, generator=generator)
        total, count = mismatched_kl(policy_K, reference_K)
        assert not total.requires_grad
        torch.testing.assert_close(total / count, (policy_K - reference_K).detach().mean())
        assert mismatched_kl(policy_K[:0], reference_K[:0])[1].item() == 0


def test_answers_without_tokens_have_a_mean_of_zero(generator: torch.Generator) -> None:
    answers = random_answers(generator)
    pairs = pair_logps(AnswerLogps(answers.logps_S, answers.answer_S, 9), torch.cat([PAIRS_P2, torch.tensor([[8, 0]])]))
    assert pairs.means()[0][-1].item() == 0
