"""CPU time and memory of the loss, and of log-probabilities by token: ours beside the plain head, forward and backward.

    python benchmarks/loss_head.py

V = 49,152, D = 576 (SmolLM2-135M), 2,048 positions, float32, frozen head, one thread. Time: process CPU-seconds, the two in
turn, minimum. Memory: peak resident set above the one before the loss, in a process for each variant. The loss is beside
Hugging Face's; log-probabilities, as preference losses weigh them, are beside logits, log-softmax and gather.

Shape suffixes: B rows, T tokens, D width, V vocabulary, S supervised positions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch makes its threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from lightning_modules.logprobs import token_logps
from lightning_modules.losses import cross_entropy, supervised

VOCABULARY, WIDTH, ROWS, TOKENS = 49_152, 576, 4, 512
SHARES = (25, 100)
Variant = Callable[[Tensor, nn.Linear, Tensor], Tensor]


def make_problem(percent: int) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states, a frozen head, and labels of which `percent` in a hundred are supervised."""
    generator = torch.Generator().manual_seed(20)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    head.weight.normal_(0, 0.05, generator=generator)
    hidden_BTD = torch.randn(ROWS, TOKENS, WIDTH, generator=generator).requires_grad_()
    labels_BT = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels_BT[:, : TOKENS - TOKENS * percent // 100] = -100
    return hidden_BTD, head, labels_BT


def plain(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor) -> Tensor:
    """Logits of every position, then Hugging Face's loss (float32 copy, shift, ignore_index)."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    count = (labels_BT[:, 1:] != -100).sum()
    return ForCausalLMLoss(head(hidden_BTD), labels_BT, VOCABULARY, num_items_in_batch=count)


def ours(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor) -> Tensor:
    """The loss of the repository."""
    hidden_SD, labels_S = supervised(hidden_BTD, labels_BT)
    nll, count, _ = cross_entropy(hidden_SD, head, labels_S)
    return nll / count


def plain_logps(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor) -> Tensor:
    """Logits of every position, log-softmax, and the labels picked from it; each weighs differently in the sum."""
    mask_BT = labels_BT[:, 1:] != -100
    logps_BTV = head(hidden_BTD)[:, :-1].float().log_softmax(-1)
    logps_BT = logps_BTV.gather(2, labels_BT[:, 1:].clamp(min=0).unsqueeze(2))[..., 0]
    return weigh(logps_BT[mask_BT])


def our_logps(hidden_BTD: Tensor, head: nn.Linear, labels_BT: Tensor) -> Tensor:
    """The log-probabilities of the repository, weighed as those."""
    hidden_SD, labels_S = supervised(hidden_BTD, labels_BT)
    return weigh(token_logps(hidden_SD, head, labels_S))


def weigh(logps_S: Tensor) -> Tensor:
    """A sum whose gradient differs from position to position."""
    return (logps_S * torch.linspace(-1, 1, len(logps_S))).sum() / len(logps_S)


VARIANTS: dict[str, dict[str, Variant]] = {
    "loss": {"plain": plain, "ours": ours},
    "logps": {"plain": plain_logps, "ours": our_logps},
}


def cpu_seconds(what: str, percent: int, repetitions: int) -> dict[str, float]:
    """Minimum CPU-seconds of each variant, measured in turn; checks that they agree."""
    hidden_BTD, head, labels_BT = make_problem(percent)
    best = dict.fromkeys(VARIANTS[what], float("inf"))
    gradients: dict[str, Tensor] = {}
    for repetition in range(repetitions + 1):
        for name, variant in VARIANTS[what].items():
            hidden_BTD.grad = None
            start = time.process_time()
            variant(hidden_BTD, head, labels_BT).backward()
            if repetition > 0:  # the first warms up
                best[name] = min(best[name], time.process_time() - start)
            assert hidden_BTD.grad is not None
            gradients[name] = hidden_BTD.grad
    difference = (gradients["ours"] - gradients["plain"]).norm() / gradients["plain"].norm()
    assert difference < 1e-5, f"gradients differ by {difference:.1e}"
    return best


def peak_mebibytes(what: str, name: str, percent: int) -> float:
    """Extra peak memory of one variant, measured in a process of its own."""
    command = [sys.executable, __file__, "--measure-memory", what, name, str(percent)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(what: str, name: str, percent: int) -> float:
    """Growth of this process's resident set at its peak in one forward and backward, in MiB."""
    hidden_BTD, head, labels_BT = make_problem(percent)
    variant = VARIANTS[what][name]
    variant(hidden_BTD[:, -8:], head, labels_BT[:, -8:]).backward()  # libraries and workspaces are not the loss's memory
    before = _status_kibibytes("VmRSS")
    variant(hidden_BTD, head, labels_BT).backward()
    return (_status_kibibytes("VmHWM") - before) / 1024


def _status_kibibytes(field: str) -> int:
    # Not getrusage: its peak is inherited from the process that started this one.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="timed repetitions of each variant")
    parser.add_argument("--measure-memory", nargs=3, metavar=("WHAT", "VARIANT", "PERCENT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure_memory:
        what, name, percent = args.measure_memory
        print(measure_memory(what, name, int(percent)))
        return

    figures: dict[str, float] = {}
    print(f"{'what':<5}  {'supervised':>10}  {'variant':<7}  {'CPU-s':>7}  {'extra MiB':>9}")
    for what, variants in VARIANTS.items():
        prefix = "" if what == "loss" else f"{what}_"
        for percent in SHARES:
            seconds = cpu_seconds(what, percent, args.repetitions)
            memory = {name: peak_mebibytes(what, name, percent) for name in variants}
            for name in variants:
                print(f"{what:<5}  {percent:>9}%  {name:<7}  {seconds[name]:>7.3f}  {memory[name]:>9.0f}", flush=True)
                figures[f"{prefix}{name}_cpu_seconds_{percent}"] = round(seconds[name], 3)
                figures[f"{prefix}{name}_extra_mib_{percent}"] = round(memory[name], 1)
            figures[f"{prefix}time_ratio_{percent}"] = round(seconds["ours"] / seconds["plain"], 4)
            figures[f"{prefix}memory_ratio_{percent}"] = round(memory["ours"] / memory["plain"], 4)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
