"""Token log-probabilities of pairs of answers, for the tests of losses."""

import torch
from torch import Tensor

from lightning_modules.logprobs import AnswerLogps
from lightning_modules.pair_logps import PairLogps, pair_logps

LENGTHS = [(3, 5), (6, 2), (4, 4), (1, 7)]
PAIRS_P2 = torch.arange(2 * len(LENGTHS)).view(-1, 2)


def random_answers(generator: torch.Generator, near: Tensor | None = None) -> AnswerLogps:
    """Answers of these lengths with random log-probabilities, or with those `near` and some noise."""
    lengths = torch.tensor(LENGTHS).flatten()
    shape = (int(lengths.sum()),)
    logps_S = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    if near is not None:
        logps_S = near.detach() + 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return AnswerLogps(logps_S.requires_grad_(), torch.arange(len(lengths)).repeat_interleave(lengths), len(lengths))


def random_pairs(generator: torch.Generator) -> tuple[PairLogps, PairLogps]:
    """A policy and a reference."""
    policy = random_answers(generator)
    with torch.no_grad():
        reference = pair_logps(random_answers(generator, near=policy.logps_S), PAIRS_P2)
    return pair_logps(policy, PAIRS_P2), reference


def swapped(pairs: PairLogps) -> PairLogps:
    """The same pairs, chosen and rejected changed about."""
    return PairLogps(pairs.rejected_P, pairs.chosen_P, pairs.rejected_count_P, pairs.chosen_count_P, -pairs.rejected_P)


def identical_pairs(theta_S: Tensor) -> PairLogps:
    """Two pairs of which both answers have the same tokens: log-probabilities of the same positions."""
    answers = AnswerLogps(theta_S.repeat(2), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3]), 4)
    return pair_logps(answers, torch.tensor([[0, 2], [1, 3]]))
