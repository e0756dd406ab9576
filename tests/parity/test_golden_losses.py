"""Losses, gradients and metrics are those that TRL gave, as make_golden.py wrote them down."""

import pytest
import torch
from loss_cases import CASES, metric_means, our_loss, read_golden

from lightning_modules.pair_logps import mean

INPUTS, GOLDEN_CASES = read_golden()
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def test_every_case_is_in_the_file() -> None:
    assert set(GOLDEN_CASES) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name: str) -> None:
    policy_S = INPUTS.policy_S.clone().requires_grad_()
    total, count, _ = our_loss(CASES[name], INPUTS, policy_S)
    mean(total, count).backward()
    golden = GOLDEN_CASES[name]
    torch.testing.assert_close(mean(total, count).item(), golden["loss"], **TOLERANCE)
    torch.testing.assert_close(policy_S.grad, torch.tensor(golden["gradient"]), **TOLERANCE)
    assert policy_S.grad.abs().max() > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_metrics(name: str) -> None:
    means = metric_means(our_loss(CASES[name], INPUTS, INPUTS.policy_S))
    golden = dict(GOLDEN_CASES[name]["metrics"])
    if CASES[name].loss == "kto":
        assert means["rewards/chosen"] - means["rewards/rejected"] == pytest.approx(golden.pop("rewards/margins"), rel=1e-5)
        if CASES[name].options.get("kind") == "apo_zero_unpaired":
            assert golden.pop("kl") == 0
    if golden.get("nll_loss") == 0:  # TRL computes it only where it is in the loss
        del golden["nll_loss"]
    assert len(golden) >= 2
    assert {metric: means[metric] for metric in golden} == pytest.approx(golden, rel=1e-5, abs=1e-5)
