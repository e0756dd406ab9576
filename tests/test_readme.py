"""The README's commands run, and its figures and links are true."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()]
SHELL = ("git clone", "source .venv")
NEEDS_THE_HUB = tuple(f"configs/sft/{recipe}" for recipe in ("image", "video", "audio"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows, where the commands run."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(commands: Sequence[str], folder: Path) -> list[str]:
    """Runs commands one after the other; returns what they say on stdout."""
    programs = [command.removeprefix("python ") for command in commands]
    warm = [sys.executable, "-m", "tests.warm", *programs]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(warm, cwd=folder, capture_output=True, text=True, env=environment, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results[-1]["code"] == 0, f"{results[-1]['command']}\n{results[-1]['stderr'][-3000:]}"
    assert [result["command"] for result in results] == programs
    return [result["stdout"] for result in results]


def run_alone(command: str, folder: Path) -> str:
    """Runs a command as a researcher does; returns what it says on stdout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    words = {word for line in re.findall(r"make ([a-z -]+)", README) for word in line.split()}
    named = words & {"demo", "demo-dpo", "test", "test-slow", "test-all", "lint", "types", "clean"}
    assert {"demo", "demo-dpo", "test", "test-slow", "test-all", "lint", "types"} <= targets
    assert named <= targets


def test_every_link_and_path_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def python_commands() -> list[str]:
    commands = [command for command in COMMANDS if not command.startswith((*SHELL, "make "))]
    assert any("fit --config configs/sft/tiny.yaml" in command for command in commands)
    assert all(command.startswith("python ") for command in commands)
    return [f"{command} --print_config" if any(name in command for name in NEEDS_THE_HUB) else command for command in commands]


def check_answers(commands: Sequence[str], outputs: Sequence[str]) -> None:
    answers = [output.strip() for command, output in zip(commands, outputs, strict=True) if "deployment.ask" in command]
    assert answers == ["blue"]


def test_the_python_commands_run_one_after_the_other(clone: Path) -> None:
    commands = python_commands()
    check_answers(commands, run(commands, clone))


@pytest.mark.slow
def test_each_python_command_runs_in_a_process_of_its_own(clone: Path) -> None:
    """Which finds nothing imported."""
    shutil.rmtree(clone / "runs", ignore_errors=True)
    commands = python_commands()
    check_answers(commands, [run_alone(command, clone) for command in commands])


BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


def test_the_benchmarks_start_as_the_readme_starts_them(clone: Path) -> None:
    commands = [f"python benchmarks/{path.name} --help" for path in BENCHMARKS]
    assert not [command for command in commands if command.removesuffix(" --help") not in README]
    assert all(output.startswith("usage: ") for output in run(commands, clone))


@pytest.mark.slow
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_starts_in_a_process_of_its_own(path: Path, clone: Path) -> None:
    assert run_alone(f"python benchmarks/{path.name} --help", clone).startswith("usage: ")
