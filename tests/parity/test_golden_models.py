"""Losses of a tiny Llama and a tiny LLaVA, and the gradients of their adapters, are those that TRL gave (make_golden.py)."""

import json
from typing import Any

import pytest
import torch
from loss_cases import CASES, Inputs
from model_cases import FAMILIES, GOLDEN, Answers, Family, along_directions, inputs_of, our_model_loss, with_adapters
from torch import nn

CASES_BY_FAMILY: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=FAMILIES)
def compared(request: pytest.FixtureRequest) -> tuple[Family, nn.Module, nn.Module, Answers, Inputs]:
    """A model with adapters, one with a scalar head too, and answers."""
    answers, model = Answers(request.param), with_adapters(request.param)
    return request.param, model, with_adapters(request.param, rewards=True), answers, inputs_of(model, answers)


def test_every_case_is_in_the_file() -> None:
    assert all(set(CASES_BY_FAMILY[family]) == set(CASES) for family in FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(compared: tuple[Family, nn.Module, nn.Module, Answers, Inputs], name: str) -> None:
    family, policy, rewarding, answers, inputs = compared
    case, golden = CASES[name], CASES_BY_FAMILY[family][name]
    model = rewarding if case.loss == "reward" else policy
    loss = our_model_loss(case, model, answers, inputs)
    torch.testing.assert_close(loss.item(), golden["loss"], rtol=1e-5, atol=1e-5)
    found, wanted = torch.tensor(along_directions(model, loss)), torch.tensor(golden["derivatives"])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.abs().max() > 1e-4
