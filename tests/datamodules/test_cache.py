"""Tensors on disk: the same bits back, never half a file, never above the limit."""

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.abandoned import ABANDONED_SECONDS
from datamodules.cache import CacheOptions, TensorCache
from datamodules.cache_keys import hash_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def key_of(number: int) -> str:
    return hash_of("test", number)


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return CacheOptions(str(tmp_path / "cache")).open()


def files(cache: TensorCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def num_bytes(cache: TensorCache) -> int:
    return sum(path.stat().st_size for path in files(cache))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_what_is_put_comes_back(cache: TensorCache, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert cache.get(key_of(0)) is None
    cache.put(key_of(0), tensor, {"shape": "30 40"})
    entry = cache.get(key_of(0))
    assert entry is not None
    assert entry.tensor.dtype == dtype and torch.equal(entry.tensor, tensor) and entry.notes == {"shape": "30 40"}


def test_views_and_leaves_are_put_as_they_are(cache: TensorCache, generator: torch.Generator) -> None:
    weight = torch.randn(4, 6, generator=generator, requires_grad=True)
    cache.put(key_of(0), weight.T[1:3])
    entry = cache.get(key_of(0))
    assert entry is not None and torch.equal(entry.tensor, weight.T[1:3]) and len(files(cache)) == 1
    entry.tensor.add_(1)  # it is the caller's own
    again = cache.get(key_of(0))
    assert again is not None and torch.equal(again.tensor, weight.T[1:3])


@pytest.mark.parametrize("damage", ["empty", "half", "text", "every bit", "other key", "folder"])
def test_a_damaged_file_is_a_miss_that_is_mended(cache: TensorCache, damage: str, generator: torch.Generator) -> None:
    tensor = torch.randn(7, generator=generator)
    cache.put(key_of(0), tensor)
    [path] = files(cache)
    whole = path.read_bytes()
    match damage:
        case "empty":
            wrong = [b""]
        case "half":
            wrong = [whole[:length] for length in range(0, len(whole), 5)]
        case "text":
            wrong = [b"hello" * 100]
        case "every bit":
            wrong = [whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :] for byte in range(len(whole))]
        case _:
            wrong = []
    for data in wrong:
        path.write_bytes(data)
        assert cache.get(key_of(0)) is None
    if damage == "other key":
        cache.put(key_of(1), tensor + 1)
        files(cache)[1 - files(cache).index(path)].replace(path)
        assert cache.get(key_of(0)) is None
    if damage == "folder":
        path.unlink()
        path.mkdir()
        assert cache.get(key_of(0)) is None
        path.rmdir()
    cache.put(key_of(0), tensor)
    entry = cache.get(key_of(0))
    assert entry is not None and torch.equal(entry.tensor, tensor)


def test_the_limit_is_kept_and_the_least_recently_used_goes(tmp_path: Path, generator: torch.Generator) -> None:
    cache = TensorCache(tmp_path, 20_000)
    for number in range(100):
        cache.put(key_of(number), torch.randn(250, generator=generator))  # 1,000 bytes and a header
        assert num_bytes(cache) <= 20_000
        assert cache.get(key_of(number)) is not None
        assert cache.get(key_of(0)) is not None, "it is used all the time"
        time.sleep(0.002)  # so that no two files have one time
    assert cache.get(key_of(1)) is None and cache.get(key_of(90)) is not None


def test_the_limit_counts_what_others_wrote(tmp_path: Path, generator: torch.Generator) -> None:
    one, other = TensorCache(tmp_path, 40_000), TensorCache(tmp_path, 40_000)
    for number in range(0, 200, 2):
        one.put(key_of(number), torch.randn(250, generator=generator))
        other.put(key_of(number + 1), torch.randn(250, generator=generator))
        assert num_bytes(one) <= 40_000 + 2 * (40_000 // 16 + 1_200)


def test_a_tensor_above_the_limit_is_left_out_with_one_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TensorCache(tmp_path, 1_000)
    cache.put(key_of(0), torch.ones(20))
    for number in (1, 2):
        cache.put(key_of(number), torch.ones(1_000))
    assert cache.get(key_of(0)) is not None and cache.get(key_of(1)) is None
    assert len(caplog.messages) == 1 and "above its limit of 1,000" in caplog.messages[0]


def test_a_full_disk_costs_nothing_but_the_entry(
    cache: TensorCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        for number in range(3):
            cache.put(key_of(number), torch.ones(20))
    assert not files(cache)
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.messages[0]
    cache.put(key_of(0), torch.ones(20))
    assert cache.get(key_of(0)) is not None


def test_a_folder_that_vanishes_is_made_again(cache: TensorCache) -> None:
    cache.folder.rmdir()
    assert cache.get(key_of(0)) is None
    cache.put(key_of(0), torch.ones(3))
    assert cache.get(key_of(0)) is not None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache folder .*file/cache cannot be made \(Not a directory\)"):
        CacheOptions(str(tmp_path / "file" / "cache")).open()
    with pytest.raises(ValueError, match=r"max_gb of the cache somewhere must be above 0, got -1"):
        CacheOptions("somewhere", max_gb=-1)


def _write_for_ever(cache: TensorCache, number: int) -> None:
    while True:
        cache.put(key_of(0), torch.full((200_000,), float(number)))


def test_processes_that_write_one_key_and_are_killed(cache: TensorCache) -> None:
    """A reader sees nothing, or the whole tensor of one of them."""
    context = multiprocessing.get_context("fork")
    writers: list[Any] = [context.Process(target=_write_for_ever, args=(cache, number)) for number in range(2)]
    for writer in writers:
        writer.start()
    num_read = 0
    deadline = time.monotonic() + 60
    while num_read < 50 and time.monotonic() < deadline:
        if (entry := cache.get(key_of(0))) is not None:
            assert float(entry.tensor[0]) in (0.0, 1.0) and bool((entry.tensor == entry.tensor[0]).all())
            num_read += 1
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    assert num_read == 50
    entry = cache.get(key_of(0))
    assert entry is not None and bool((entry.tensor == entry.tensor[0]).all())


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, 3_000)
    cache.put(key_of(0), torch.ones(100))
    [path] = files(cache)
    left, at_work = path.with_name(".left"), path.with_name(".at_work")
    for unfinished in (left, at_work):
        unfinished.write_bytes(b"0" * 100)
    os.utime(left, (0, time.time() - ABANDONED_SECONDS - 1))
    assert cache.get(key_of(0)) is not None
    pickle.loads(pickle.dumps(TensorCache(tmp_path, 3_000))).put(key_of(1), torch.ones(100))
    assert not left.exists() and at_work.exists()


def test_keys_lie_in_many_folders(cache: TensorCache) -> None:
    tensor: Tensor = torch.ones(1)
    for number in range(40):
        cache.put(key_of(number), tensor)
    assert len({path.parent for path in files(cache)}) > 20 and len(files(cache)) == 40
