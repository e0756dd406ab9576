"""Shape suffixes as in lightning_modules/pair_logps.py."""

import math

import pytest
import torch

from lightning_modules.logprobs import AnswerLogps
from lightning_modules.pair_logps import (
    combine,
    logp_metrics,
    mean,
    pair_logps,
    pair_loss,
    reward_metrics,
    token_nll,
    wpo_importance,
)

ANSWERS = AnswerLogps(torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0]), torch.tensor([0, 0, 0, 1, 2, 2]), 3)
PAIRS_P2 = torch.tensor([[0, 1], [0, 2]])  # one chosen answer, two rejected ones


class TestPairLogps:
    def test_sums_counts_and_means(self) -> None:
        pairs = pair_logps(ANSWERS, PAIRS_P2)
        assert pairs.chosen_P.tolist() == [-7, -7]
        assert pairs.rejected_P.tolist() == [-8, -48]
        assert (pairs.chosen_count_P.tolist(), pairs.rejected_count_P.tolist()) == ([3, 3], [1, 2])
        chosen_P, rejected_P = pairs.means()
        assert chosen_P.tolist() == pytest.approx([-7 / 3, -7 / 3])
        assert rejected_P.tolist() == [-8, -24]

    def test_tokens_beyond_the_common_length_of_each_pair_count_less(self) -> None:
        pairs = pair_logps(ANSWERS, PAIRS_P2, ld_alpha=0.5)
        assert pairs.chosen_P.tolist() == [-1 - 0.5 * 6, -3 - 0.5 * 4]
        assert pairs.rejected_P.tolist() == [-8, -48]
        assert pairs.chosen_nll_P.tolist() == [7, 7]
        assert pair_logps(ANSWERS, PAIRS_P2, ld_alpha=0).chosen_P.tolist() == [-1, -3]

    @pytest.mark.parametrize("alpha", [-0.1, 1.1])
    def test_a_weight_outside_its_range_is_refused(self, alpha: float) -> None:
        with pytest.raises(ValueError, match="ld_alpha"):
            pair_logps(ANSWERS, PAIRS_P2, alpha)

    def test_nll_is_a_mean_of_tokens(self) -> None:
        pairs = pair_logps(ANSWERS, torch.tensor([[1, 0], [2, 0]]))
        total, count, _ = token_nll(pairs)
        assert (total.item(), count.item()) == (8 + 48, 3)

    def test_importance_is_that_of_the_paper(self) -> None:
        log_square_S = torch.tensor([-0.5, -1.0, -1.5, -2.0, -2.5, -3.0])
        importance_P = wpo_importance(ANSWERS, log_square_S, PAIRS_P2)
        chosen = math.exp((-0.5 - 1.0 - 2.5) / 3)
        assert importance_P.tolist() == pytest.approx([chosen * math.exp(-6), chosen * math.exp((-13.5 - 29) / 2)])


class TestLoss:
    def test_weights_are_in_sum_and_count(self) -> None:
        total, count, _ = pair_loss(torch.tensor([2.0, 4.0]), torch.tensor([0.5, 1.0]), {})
        assert (total.item(), count.item()) == (5, 1.5)
        total, count, _ = pair_loss(torch.tensor([2.0, 4.0]), None, {})
        assert (total.item(), count.item()) == (6, 2)

    def test_terms_keep_their_own_mean(self) -> None:
        main = torch.tensor(6.0), torch.tensor(3.0), {"main": (torch.ones(1), torch.ones(1))}
        term = torch.tensor(20.0), torch.tensor(5.0), {"term": (torch.ones(1), torch.ones(1))}
        total, count, metrics = combine(main, (0.5, term))
        assert mean(total, count).item() == 2 + 0.5 * 4
        assert (total.tolist(), count.tolist()) == ([6, 10], [3, 5])
        assert set(metrics) == {"main", "term"}

    def test_a_term_without_summands_adds_nothing(self) -> None:
        value = torch.tensor([1.0], requires_grad=True)
        empty = value[:0].sum(), torch.tensor(0.0), {}
        total, count, _ = combine((value.sum(), torch.tensor(1.0), {}), (1.0, empty))
        mean(total, count).backward()
        assert (mean(total, count).item(), value.grad.item()) == (1, 1)


def test_metrics() -> None:
    metrics = reward_metrics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 5.0]))
    means = {name: (total.sum() / count.sum()).item() for name, (total, count) in metrics.items()}
    assert means == pytest.approx(
        {"rewards/chosen": 2, "rewards/rejected": 7 / 3, "rewards/margins": -1 / 3, "rewards/accuracies": 1 / 3}
    )
    pairs = pair_logps(ANSWERS, torch.tensor([[1, 0], [2, 0]]))
    for normalized, expected in (
        (False, {"logps/chosen": -28, "logps/rejected": -7}),
        (True, {"logps/chosen": -16, "logps/rejected": -7 / 3}),
    ):
        metrics = logp_metrics(pairs, normalized)
        means = {name: (total.sum() / count.sum()).item() for name, (total, count) in metrics.items()}
        assert means == pytest.approx(expected | {"nll_loss": 56 / 3})
