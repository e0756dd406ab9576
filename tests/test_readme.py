"""The README's commands run, and its figures and links are true."""

import os
import re
import shlex
import shutil
import subprocess
import sys
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


def run(command: str, folder: Path) -> str:
    words = shlex.split(command)
    assert words[0] == "python", command
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, env=environment, check=False)
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


def test_the_python_commands_run_one_after_the_other(clone: Path) -> None:
    commands = [command for command in COMMANDS if not command.startswith((*SHELL, "make "))]
    assert any("fit --config configs/sft/tiny.yaml" in command for command in commands)
    for command in commands:
        if any(recipe in command for recipe in NEEDS_THE_HUB):
            command += " --print_config"
        output = run(command, clone)
        if "deployment.ask" in command:
            assert output.strip() == "blue"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_starts_as_the_readme_starts_it(path: Path) -> None:
    assert f"python benchmarks/{path.name}" in README
    done = subprocess.run([sys.executable, str(path), "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
