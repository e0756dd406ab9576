"""Writes what TRL computes for the cases of loss_cases.py, on numbers and on models, for suites that run without it.

    pip install -r requirements-parity.txt
    python tests/parity/make_golden.py

In float32: loss, gradient for the policy's token log-probabilities, and metrics; of a tiny Llama and a tiny LLaVA the loss, and
its derivative for each adapter along a direction.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import model_cases
import trl
from loss_cases import CASES, GOLDEN, Inputs, random_inputs
from trl_losses import trl_loss
from trl_models import TRLModels


def golden_cases(inputs: Inputs) -> dict[str, dict]:
    """By case: TRL's loss, gradient and metrics."""
    cases = {}
    for name, case in CASES.items():
        policy_S = inputs.policy_S.clone().requires_grad_()
        loss, metrics = trl_loss(case, inputs, policy_S)
        loss.backward()
        known = {key: float(value) for key, value in metrics.items() if key.startswith(("rewards", "logps", "kl", "nll", "log_"))}
        gradient = [float(f"{x:.9g}") for x in policy_S.grad.tolist()]
        cases[name] = {"loss": loss.item(), "gradient": gradient, "metrics": known}
    return cases


def golden_models(family: model_cases.Family) -> dict[str, dict]:
    """By case: TRL's loss of a model, and its derivatives."""
    with tempfile.TemporaryDirectory() as folder:
        models, cases = TRLModels(family, Path(folder)), {}
        for name, case in CASES.items():
            model, loss = models.loss(case)
            derivatives = [float(f"{x:.9g}") for x in model_cases.along_directions(model, loss)]
            cases[name] = {"loss": loss.item(), "derivatives": derivatives}
    return cases


def main() -> None:
    inputs = random_inputs(seed=20)
    lines = [f'"trl": "{trl.__version__}"', f'"inputs": {json.dumps({k: v.tolist() for k, v in asdict(inputs).items()})}']
    GOLDEN.write_text(_json([*lines, f'"cases": {_table(golden_cases(inputs))}']), encoding="utf-8")
    families = [f'"{family}": {_table(golden_models(family))}' for family in model_cases.FAMILIES]
    model_cases.GOLDEN.write_text(_json([lines[0], *families]), encoding="utf-8")


def _table(cases: dict[str, dict]) -> str:
    """A case a line."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items()) + "\n}"


def _json(members: list[str]) -> str:
    return "{" + ",\n".join(members) + "}\n"


if __name__ == "__main__":
    main()
