"""The scripts that start a run on a cluster."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CONFIGS = ["--config", "configs/sft/tiny.yaml", "--config", "configs/strategy/fsdp.yaml"]


def start(script: str, run: Path, folder: Path, **variables: str) -> list[str]:
    """The command that a script gives to `srun` or `torchrun`, which a stand-in prints."""
    stand_in = folder / ("srun" if script == "slurm" else "torchrun")
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    command = [str(ROOT / f"configs/cluster/{script}.sh"), str(run), *CONFIGS]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("script", "variables"),
    [("slurm", {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}), ("torchrun", {"NODES": "2", "DEVICES": "8"})],
)
def test_a_script_starts_a_run_and_goes_on_with_it(script: str, variables: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = start(script, run, tmp_path, **variables)
    options = words[words.index("fit") + 1 :]
    assert options == [*CONFIGS, "--trainer.default_root_dir", str(run), "--trainer.num_nodes", "2", "--trainer.devices", "8"]
    run.mkdir()
    (run / "config.yaml").touch()
    assert start(script, run, tmp_path, **variables) == [*words, "--ckpt_path", "last"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp"])
def test_two_processes_train_by_the_command_line_and_go_on(strategy: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "DEVICES": "2", "MASTER": f"127.0.0.1:{port}", "OMP_NUM_THREADS": "1", "PATH": path}
    configs = ["--config", "configs/sft/tiny.yaml", "--config", f"configs/strategy/{strategy}.yaml"]
    for epochs in (5, 10):
        command = [
            str(ROOT / "configs/cluster/torchrun.sh"),
            str(tmp_path / "run"),
            *configs,
            "--trainer.max_epochs",
            str(epochs),
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 9
