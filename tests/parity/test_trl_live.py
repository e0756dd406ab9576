"""TRL's own trainers and ours compute the same: on fresh numbers, on a tiny Llama and on a tiny LLaVA, each with LoRA.

Needs requirements-parity.txt; left out where TRL is not installed. The models' gradients are those of all adapters.
"""

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install -r requirements-parity.txt")
pytestmark = pytest.mark.slow

from loss_cases import CASES, our_loss, random_inputs
from model_cases import FAMILIES, adapters, inputs_of, our_model_loss
from trl_losses import trl_loss
from trl_models import TRLModels

from lightning_modules.pair_logps import mean

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_losses_on_fresh_numbers(name: str, seed: int) -> None:
    inputs = random_inputs(seed)
    gradients = []
    values = []
    for loss_of in (our_loss, trl_loss):
        policy_S = inputs.policy_S.clone().requires_grad_()
        result = loss_of(CASES[name], inputs, policy_S)
        loss = mean(*result[:2]) if loss_of is our_loss else result[0]
        loss.backward()
        values.append(loss.detach())
        gradients.append(policy_S.grad)
    torch.testing.assert_close(*values, **TOLERANCE)
    torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TRLModels:
    return TRLModels(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_a_model(models: TRLModels, name: str) -> None:
    case = CASES[name]
    model, theirs = models.loss(case)
    weights = adapters(model)
    assert weights and all("lora_" in own for own in weights)
    inputs = None if case.loss == "reward" else inputs_of(model, models.answers)
    ours = our_model_loss(case, model, models.answers, inputs)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    # LLaVA does not use the last layer of its vision tower
    gradients, expected = (
        torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True) for loss in (ours, theirs)
    )
    assert max(x.abs().max() for x in expected) > 1e-3
    for own, gradient, wanted in zip(weights, gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, msg=lambda text, own=own: f"{own}: {text}", **TOLERANCE)
