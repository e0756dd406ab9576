"""Peers that take their steps in turn, each in a process of its own, and what a step of each costs.

A peer is a program that calls `Turn.begin` before each step and `Turn.end` after it. It runs only while it is its turn, so the
peers see the same machine; times are process CPU-seconds.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


class Turn:
    """The side of a peer."""

    def __init__(self) -> None:
        self._talk = os.fdopen(os.dup(1), "w")  # what libraries print must not get in between
        os.dup2(2, 1)
        self._idle_kibibytes = 0

    def begin(self) -> None:
        """Waits for the turn."""
        self._say({"ready": True})
        sys.stdin.readline()
        if not self._idle_kibibytes:
            self._idle_kibibytes = _status_kibibytes("VmRSS")
        self._gemm = gemm_gflops()
        self._started = time.process_time()

    def end(self, loss: float, **more: float) -> None:
        """Tells what the step cost, and what else there is to tell."""
        seconds = time.process_time() - self._started
        mebibytes = (_status_kibibytes("VmHWM") - self._idle_kibibytes) / 1024
        self._say({"seconds": seconds, "loss": loss, "extra_mib": mebibytes, "gemm_gflops": self._gemm, **more})

    def _say(self, message: Mapping[str, Any]) -> None:
        self._talk.write(json.dumps(message) + "\n")
        self._talk.flush()


def gemm_gflops(size: int = 1024) -> float:
    """The best of three products of square matrices, in GFLOP per CPU-second of this process."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        torch.mm(a, b)
        best = min(best, time.process_time() - started)
    return 2 * size**3 / best / 1e9


Steps = dict[str, list[dict[str, Any]]]
"""By the name of a peer what each step cost."""


def take_turns(commands: Mapping[str, Sequence[str]], num_steps: int, say: Callable[[str], None]) -> Steps:
    """Starts the peers and lets each take a step in turn.

    Args:
        commands: Arguments of python, by the name of the peer.
        num_steps: Steps of each.
        say: Told of each step.

    Returns:
        For each peer what each step cost.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    peers = {
        name: subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name, command in commands.items()
    }
    steps: Steps = {name: [] for name in peers}
    try:
        for name, peer in peers.items():
            _hear(name, peer)
        for step in range(num_steps):
            for name, peer in peers.items():
                assert peer.stdin is not None
                peer.stdin.write("go\n")
                peer.stdin.flush()
                told = _hear(name, peer)
                steps[name].append(told)
                say(f"step {step + 1}  {name:<8} {told['seconds']:7.2f} CPU-s   loss {told['loss']:.6f}")
                if step + 1 < num_steps:
                    _hear(name, peer)
    finally:
        for peer in peers.values():
            peer.kill()
    return steps


def _hear(name: str, peer: "subprocess.Popen[str]") -> dict[str, Any]:
    assert peer.stdout is not None
    line = peer.stdout.readline()
    if not line:
        raise RuntimeError(f"{name} ended with {peer.wait()} before its turn was over: its messages are above")
    return json.loads(line)


def _status_kibibytes(field: str) -> int:
    # not getrusage: its peak is inherited from the process that started this one
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only")
