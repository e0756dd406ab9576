"""What a killed writer has left in a cache folder goes away, and what another writer is at does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.abandoned import ABANDONED_SECONDS, sweep_abandoned
from datamodules.dataset import MultiModalDataset
from datamodules.jsonl import JsonlFile
from datamodules.row_sizes import row_sizes
from tests.datamodules.loader_fakes import write_rows

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from datamodules import {module}

def kill(self, target):
    os.kill(os.getpid(), signal.SIGKILL)

Path.replace = kill
{call}
"""


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/omnilit"


def leave(module: str, call: str, folder: Path) -> Path:
    """What a writer leaves that is killed before it renames its file."""
    done = subprocess.run([sys.executable, "-c", KILLED.format(module=module, call=call)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = folder.glob("*.tmp")
    return left


def age(file: Path, seconds: float) -> None:
    os.utime(file, (0, time.time() - seconds))


def test_an_index(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    left = leave("jsonl", f"jsonl.JsonlFile(Path({str(rows)!r}))", tmp_path)
    own = tmp_path / "notes.idx.1-2.tmp"
    own.touch()
    age(own, 1e6)
    JsonlFile(rows)
    assert left.exists(), "it may be that of a process that is at work"
    age(left, ABANDONED_SECONDS + 9)
    (tmp_path / "rows.jsonl.idx").unlink()
    JsonlFile(rows)
    assert not left.exists() and own.exists() and (tmp_path / "rows.jsonl.idx").exists()


def test_an_index_in_the_cache_folder(tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    (tmp_path / "rows.jsonl.idx").mkdir()  # no index can be written beside the file
    (cache_home / "jsonl").mkdir(parents=True)
    left = cache_home / "jsonl/0123.idx.17-0123abcd.tmp"
    left.touch()
    age(left, ABANDONED_SECONDS + 9)
    JsonlFile(rows)
    assert [path.suffix for path in (cache_home / "jsonl").iterdir()] == [".idx"]


def test_sizes_of_rows(tmp_path: Path, cache_home: Path, row_processor: Any) -> None:
    folder = cache_home / "sizes"
    left = leave("kept_sizes", f"kept_sizes.keep(Path({str(folder / '01.npy')!r}), np.zeros((4, 2)))", folder)
    dataset = MultiModalDataset(str(write_rows(tmp_path / "rows.jsonl", 3)), str(tmp_path), row_processor)
    row_sizes(dataset, num_workers=0)
    (kept,) = folder.glob("*.npy")
    assert left.exists()
    age(left, ABANDONED_SECONDS + 9)
    kept.unlink()
    row_sizes(dataset, num_workers=0)
    assert list(folder.iterdir()) == [kept]


def test_what_cannot_be_deleted_stays(tmp_path: Path) -> None:
    (tmp_path / "folder.tmp").mkdir()
    age(tmp_path / "folder.tmp", 1e6)
    sweep_abandoned(tmp_path, "*.tmp")
    sweep_abandoned(tmp_path / "nowhere", "*.tmp")
    assert (tmp_path / "folder.tmp").exists()
