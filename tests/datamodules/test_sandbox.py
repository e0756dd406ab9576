"""A reader that crashes, hangs, eats memory or fails costs its row and nothing else, and no process is left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules import media
from datamodules.batch import Batch
from datamodules.media import MediaLimits
from datamodules.media_image import ImageLimits
from datamodules.processor import Processor
from datamodules.sandbox import Isolated, Sandbox
from datamodules.sources import MediaError, MediaRoot
from tests.datamodules import faulty
from tests.datamodules.loader_fakes import RecordingDataset, ids, make_loader, make_row, same, write_rows

ROOT = Path(__file__).parents[2]
LIMITS = ImageLimits(max_decode_seconds=2.0, max_memory_bytes=400_000_000)


def isolated(name: str = "it", max_seconds: float = 5.0, max_bytes: int = 400_000_000) -> Isolated:
    return Isolated(name, "limits.image", max_seconds, max_bytes)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def wait_for_end(pid: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", r"hang\.png took longer than limits\.image\.max_decode_seconds = 1 to read"),
        ("busy", r"busy\.png took longer than limits\.image\.max_decode_seconds = 1 to read"),
        ("crash", r"crash\.png crashes its decoder: the process that read it ended by SIGSEGV"),
        ("exit", r"exit\.png crashes its decoder: the process that read it ended with exit code 3"),
        ("eat", r"eat\.png needs more than limits\.image\.max_memory_bytes = 400,000,000 to be read"),
        ("eat-slowly", r"eat-slowly\.png needs more than limits\.image\.max_memory_bytes = 400,000,000 to be read"),
        ("bug", r"bug\.png makes its decoder fail: IndexError: the list is too short"),
        ("bad", r"bad\.png is bad"),
    ],
)
def test_a_fault_is_named_and_the_next_picture_is_read(fault: str, reason: str, tmp_path: Path) -> None:
    expected = faulty.picture(tmp_path, "good.png", seed=4)
    root = MediaRoot(tmp_path)
    for _ in range(2):
        call = isolated(f"{fault}.png", 1.0 if fault in ("hang", "busy") else 30.0, LIMITS.max_memory_bytes)
        with pytest.raises(MediaError, match=reason):
            call(faulty.read, f"{fault}.png", root, LIMITS)
        read = isolated()(faulty.read, "good.png", root, LIMITS)
        assert np.array_equal(np.asarray(read), expected) and read.mode == "RGB"


def test_a_process_that_cannot_even_end_itself_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.sandbox._GRACE_SECONDS", 0.2)
    with pytest.raises(MediaError, match="took longer"):
        isolated("stop.png", 0.3)(faulty.read, "stop.png", MediaRoot(tmp_path), LIMITS)


def test_what_a_decoder_prints_is_no_answer(tmp_path: Path) -> None:
    expected = faulty.picture(tmp_path, "chatter.png", seed=5)
    read = isolated()(faulty.read, "chatter.png", MediaRoot(tmp_path), LIMITS)
    assert np.array_equal(np.asarray(read), expected)


def test_one_process_serves_until_it_has_lost_half_of_its_memory() -> None:
    (first,) = isolated()(faulty.pid)
    assert first != os.getpid() and isolated()(faulty.pid) == (first,)
    assert isolated()(faulty.leak, 50_000_000) == (first,) == isolated()(faulty.pid)
    assert isolated()(faulty.leak, 200_000_000) == (first,)  # what it gave is given
    assert isolated()(faulty.pid) != (first,) and wait_for_end(first)


def test_the_end_that_an_earlier_file_left_behind_costs_no_row() -> None:
    (first,) = isolated()(faulty.crash_later, 0.2)
    (second,) = isolated()(faulty.work, 0.5)
    assert second != first


def test_a_call_that_was_interrupted_leaves_no_answer_behind(tmp_path: Path) -> None:
    (first,) = isolated()(faulty.pid)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            isolated()(faulty.work, 3.0)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    (second,) = isolated()(faulty.pid)
    assert second != first and wait_for_end(first)


def test_threads_take_turns() -> None:
    results: list[tuple[int]] = []
    threads = [threading.Thread(target=lambda: results.extend(isolated()(faulty.pid) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and len(set(results)) == 1


def test_a_forked_process_has_a_sandbox_of_its_own() -> None:
    (ours,) = isolated()(faulty.pid)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(isolated()(faulty.pid)[0]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = int(os.read(reader, 100))
    assert theirs not in (ours, child) and isolated()(faulty.pid) == (ours,)
    assert wait_for_end(theirs)
    os.close(reader)
    os.close(writer)


def test_it_imports_no_torch_and_no_model() -> None:
    (pid,) = isolated()(faulty.pid)
    code = "import sys, datamodules.sandbox_process; print(*{'torch', 'transformers', 'encoders'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "\n"
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_sandbox_that_cannot_start_is_no_fault_of_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"cannot be started: it ended with exit code 1.*limits\.isolate: false") as caught:
        Sandbox().run(isolated(), b"")
    assert not isinstance(caught.value, MediaError)


@pytest.mark.parametrize("end", ["return", "kill"])
def test_it_ends_with_its_owner(end: str) -> None:
    code = f"""
        import os, signal
        from tests.datamodules import faulty
        from datamodules.sandbox import Isolated
        call = Isolated("it", "limits.image", 60.0, 1 << 30)
        print(call(faulty.pid)[0], flush=True)
        if {end == "kill"}:
            call(faulty.read, "hang.png", None, None)
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    if end == "kill":
        time.sleep(0.2)
        assert is_alive(pid)
        owner.kill()
    assert owner.wait(20) == (-signal.SIGKILL if end == "kill" else 0)
    assert wait_for_end(pid)
    if end == "return":
        assert not Path(f"/proc/{pid}").exists()  # not even a zombie


def children(pid: int) -> set[int]:
    """Processes that a process has started, and that have not ended."""
    return {int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()}


class Faulty(RecordingDataset):
    """Reads its pictures by `faulty.read`."""

    def __getitems__(self, keys: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(media, "decode_image", faulty.read)
            return super().__getitems__(keys)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_over_crashes_and_hangs(num_workers: int, tmp_path: Path, row_processor: Processor) -> None:
    faults = {1: "crash", 3: "eat", 4: "hang", 6: "bug"}
    for fault in faults.values():
        (tmp_path / f"{fault}.png").write_bytes(b"never read")

    def load(lines: dict[int, str], isolate: bool, num_workers: int) -> tuple[list[Batch], dict[int, str]]:
        path = write_rows(tmp_path / "rows.jsonl", 9, lines)
        dataset = Faulty(str(path), str(tmp_path), row_processor, limits=MediaLimits(image=LIMITS, isolate=isolate))
        dataset.record = tmp_path / "record"
        folder = tmp_path / f"isolate-{isolate}"
        loader = make_loader(dataset, folder=folder, num_workers=num_workers)
        batches = list(loader)
        loader.stop_workers()
        assert loader.row_counts()["trained"] == 9 - len(lines)
        named = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
        return batches, {row["line"] - 1: row["reason"] for row in named}

    batches, skipped = load({row: json.dumps(make_row(row, f"{fault}.png")) for row, fault in faults.items()}, True, num_workers)
    assert sorted(skipped) == sorted(faults)
    for row, reason in {1: "SIGSEGV", 3: "max_memory_bytes", 4: "max_decode_seconds", 6: "IndexError"}.items():
        assert skipped[row].startswith(f"{faults[row]}.png") and reason in skipped[row]
    gaps, _ = load(dict.fromkeys(faults, "{"), False, 0)
    assert ids(batches) == ids(gaps)
    for batch, gap in zip(batches, gaps, strict=True):
        assert len(batch["skipped"]) == len(gap["skipped"])
        batch["skipped"], gap["skipped"] = [], []
        assert same(batch, gap)


def test_workers_leave_no_process_behind(recording_dataset: Callable[..., RecordingDataset]) -> None:
    before = children(os.getpid())
    loader = make_loader(recording_dataset(), num_workers=2)
    list(loader)
    workers = children(os.getpid()) - before
    sandboxes = [pid for worker in workers for pid in children(worker)]
    assert len(workers) == 2 and len(sandboxes) == 2
    loader.stop_workers()
    assert all(wait_for_end(pid) for pid in sandboxes) and not [pid for pid in sandboxes if Path(f"/proc/{pid}").exists()]
