"""A folder for kept sizes that fails, and files in it that are damaged, cost another look and nothing else."""

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.batching import Batching
from datamodules.dataset import MultiModalDataset
from datamodules.kept_sizes import keep, kept_sizes, place_of
from datamodules.loader import StatefulLoader
from datamodules.row_sizes import agree_on_sizes, row_sizes
from tests.datamodules.loader_fakes import write_rows

SIZES_4R = np.arange(28, dtype=np.int32).reshape(4, 7)


@pytest.fixture
def dataset(tmp_path: Path, row_processor, monkeypatch) -> MultiModalDataset:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return MultiModalDataset(str(write_rows(tmp_path / "rows.jsonl", 7)), str(tmp_path), row_processor)


def agreed(dataset: MultiModalDataset, ckpt_path: Path | None = None) -> StatefulLoader:
    alone = SimpleNamespace(reduce_boolean_decision=lambda is_done: is_done, broadcast=lambda sizes: sizes)
    trainer = SimpleNamespace(global_rank=0, ckpt_path=ckpt_path, strategy=alone, datamodule=SimpleNamespace())
    loader = StatefulLoader(dataset, 1, {}, batching=Batching("packed", max_tokens=60))
    agree_on_sizes(loader, trainer)
    return loader


def test_a_run_goes_on_where_sizes_cannot_be_kept(dataset, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "datamodules.kept_sizes"):
        for _ in range(2):
            assert agreed(dataset).sizes().tokens_R.tolist() == [len(dataset[row].tokens) for row in range(7)]
    folder = tmp_path / "file" / "omnilit" / "sizes"
    (said,) = [record.getMessage() for record in caplog.records if record.name == "datamodules.kept_sizes"]  # once in all
    assert said.startswith(f"{folder} cannot be written (Not a directory): the lengths of rows are not kept there, and will be")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_files_that_were_cut_off_are_written_anew(dataset, tmp_path, share):
    """Those of the look at the rows, and of what a run began with."""
    first = agreed(dataset)
    torch.save({"SimpleNamespace": {"train": first.state_dict()}}, tmp_path / "last.ckpt")
    files = sorted((tmp_path / "cache" / "omnilit" / "sizes").iterdir())
    whole = [file.read_bytes() for file in files]
    assert len(files) == 2
    for path in (None, tmp_path / "last.ckpt"):
        for file, content in zip(files, whole, strict=True):
            file.write_bytes(content[: int(share * len(content))])
        assert all(np.array_equal(*pair) for pair in zip(agreed(dataset, path).sizes(), first.sizes(), strict=True))
        assert [file.read_bytes() for file in files] == whole
    files[0].unlink()
    place_of(dataset).write_bytes(whole[0][: int(share * len(whole[0]))])
    assert np.array_equal(row_sizes(dataset, num_workers=0).tokens_R, first.sizes().tokens_R)  # as `plan` does


@pytest.mark.parametrize("other", [SIZES_4R[:, :6], SIZES_4R[:2], SIZES_4R.astype(np.int64), SIZES_4R.ravel()])
def test_sizes_of_another_form_are_no_sizes(tmp_path, other):
    place = tmp_path / "sizes.npy"
    assert kept_sizes(place, 7) is None
    np.save(place, other)
    assert kept_sizes(place, 7) is None
    keep(place, SIZES_4R)
    found = kept_sizes(place, 7)
    assert found is not None and np.array_equal(found, SIZES_4R)


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch, caplog):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = tmp_path / "new" / "sizes.npy"
    with monkeypatch.context() as change:
        change.setattr("datamodules.kept_sizes.os", SimpleNamespace(fsync=full))
        keep(place, SIZES_4R)
    assert place.parent.is_dir() and not [*place.parent.iterdir()]
    assert f"{place.parent} cannot be written (No space left on device)" in caplog.text
    keep(place, SIZES_4R)
    assert [*place.parent.iterdir()] == [place]
