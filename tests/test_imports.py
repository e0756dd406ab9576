"""Imports point one way, and start-up imports no more than it needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "encoders",
    "models",
    "datamodules",
    "lightning_modules",
    "inspection",
    "planning",
    "deployment",
    "demo",
    "train",
    "tests",
}
MAY_IMPORT = {
    "encoders": {"encoders"},
    "models": {"models", "encoders", "datamodules.batch"},
    "datamodules": {"datamodules"},
    "lightning_modules": {"lightning_modules", "models", "encoders", "datamodules"},
    "inspection": {"inspection", "datamodules", "lightning_modules.commands"},
    "planning": {"planning", "encoders", "models", "datamodules", "lightning_modules"},
    "deployment": {"deployment", "models", "datamodules"},
    "demo": {"demo", "train", "encoders", "datamodules", "deployment"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules of ours that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name for name in names if name.split(".")[0] in ROOMS}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        wrong = {n for n in imported(path) if n not in MAY_IMPORT[room] and n.split(".")[0] not in MAY_IMPORT[room]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_a_wrong_import_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from models.language import LanguageModel\n    return LanguageModel\n")
    assert imported(path) == {"models.language"}


def test_start_up_imports_no_library_that_it_does_not_need() -> None:
    heavy = "{'timm', 'peft', 'wandb', 'PIL.Image', 'transformers.models.llama'}"
    code = f"import sys, train; print(*sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    bare = "import sys, lightning.pytorch.cli, torchmetrics; print(*sorted(sys.modules))"
    needed = subprocess.run([sys.executable, "-c", bare], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= {*needed, "PIL.Image"}


def test_files_and_functions_are_short() -> None:
    for room in MAY_IMPORT:
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert text.count("\n") <= 300, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines: split it"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or node.lineno) - node.lineno
                    assert length <= 60, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
