"""Writes what TRL computes for the cases of loss_cases.py, for suites that run without it.

    pip install -r requirements-parity.txt
    python tests/parity/make_golden.py

Loss, gradient for the policy's token log-probabilities, and metrics, in float32.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trl
from loss_cases import CASES, GOLDEN, Inputs, random_inputs
from trl_losses import trl_loss


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


def main() -> None:
    inputs = random_inputs(seed=20)
    lines = [f'"trl": "{trl.__version__}"', f'"inputs": {json.dumps({k: v.tolist() for k, v in asdict(inputs).items()})}']
    cases = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in golden_cases(inputs).items())
    GOLDEN.write_text("{" + ",\n".join([*lines, '"cases": {\n' + cases + "\n}"]) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
