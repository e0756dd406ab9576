"""A place in the training data is one in these rows, in this order, and is refused where it would be one in others."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.batching import Batching
from datamodules.data_order import check_order
from datamodules.dataset import MultiModalDataset
from datamodules.jsonl import JsonlFile
from datamodules.loader import StatefulLoader
from datamodules.packing import RowSizes
from tests.datamodules.loader_fakes import ids, make_loader, take, write_rows

Loader = Callable[..., StatefulLoader]


@pytest.fixture
def loader(tmp_path: Path, row_processor: Any) -> Loader:
    """`loader(path, prompt_template=None, **options)`: of the rows of a file, with media beside it."""

    def make(path: Path, prompt_template: str | None = None, **options: Any) -> StatefulLoader:
        dataset = MultiModalDataset(str(path), str(tmp_path), row_processor, prompt_template, seed=3)
        return make_loader(dataset, **options)

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 7)


def refused(loader: StatefulLoader, state: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=rf"belongs to {what} [0-9a-f]{{16}}.* \(now [0-9a-f]{{16}}.*\): a run is resumed"):
        loader.load_state_dict(state)


def test_other_rows_of_the_same_number_are_refused(loader: Loader, rows: Path, tmp_path: Path) -> None:
    state = loader(rows).state_dict()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows.read_text().splitlines()[::-1]) + "\n")
    refused(loader(other), state, "rows that were looked at")
    refused(loader(rows, "Say {question}"), state, "hash of prompt_template and split")
    rows.unlink()
    shutil.copy(other, rows)
    refused(loader(rows), state, "rows that were looked at")


@pytest.mark.parametrize("change", ["two swapped", "a word"])
def test_rows_that_were_mended_are_said(loader: Loader, rows: Path, caplog: pytest.LogCaptureFixture, change: str) -> None:
    """As one that stopped the run: it goes on with the row as it is now."""
    state = json.loads(json.dumps(loader(rows).state_dict()))
    lines = rows.read_text().splitlines()
    swapped = [*lines[:2], lines[3], lines[2], *lines[4:]]
    mended = "\n".join(swapped) + "\n" if change == "two swapped" else rows.read_text().replace("It is 5.", "It is 6.")
    rows.unlink()
    rows.write_text(mended)
    number = 2 if change == "two swapped" else 1
    with caplog.at_level(logging.WARNING):
        loader(rows).load_state_dict(state)
    assert f"another than when the checkpoint was written: {number} of 7 rows that were looked at have changed" in caplog.text


def test_other_rows_of_a_file_are_refused(recording_dataset: Callable[..., MultiModalDataset]) -> None:
    """As many, held out by another share or seed."""
    state = make_loader(recording_dataset(rows=[0, 2, 4])).state_dict()
    refused(make_loader(recording_dataset(rows=[0, 2, 5])), state, "hash of prompt_template and split")


def test_the_same_rows_in_another_place_are_taken(loader: Loader, rows: Path, tmp_path: Path) -> None:
    whole, first = loader(rows), loader(rows)
    expected = list(whole)
    state = (take(first, 2), first.state_dict())[1]
    other = tmp_path / "copy.jsonl"
    shutil.copy(rows, other)
    os.utime(other, (1, 1))
    resumed = loader(other)
    resumed.load_state_dict(state)
    assert ids(list(resumed)) == ids(expected[2:])


def test_other_sizes_than_packs_were_made_of_are_refused(loader: Loader, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture was replaced, or is there at last: the packs of the epoch at hand would be others."""
    sizes = RowSizes(np.full(7, 20, np.int32), np.full(7, 2, np.int32))
    monkeypatch.setattr("datamodules.row_sizes.row_sizes", lambda *arguments: sizes)
    packed = {"batching": Batching("packed", max_tokens=64), "batch_size": 1}
    state = json.loads(json.dumps(loader(rows, **packed).state_dict()))
    loader(rows, **packed).load_state_dict(state)
    sizes.tokens_R[3] += 1
    refused(loader(rows, **packed), state, "hash of the rows' sizes")


def test_a_checkpoint_that_does_not_say_is_taken_with_a_warning(
    loader: Loader, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = loader(rows).state_dict()
    state["order"] = {name: value for name, value in state["order"].items() if not name.startswith(("hash", "rows"))}
    with caplog.at_level(logging.WARNING):
        loader(rows).load_state_dict(state)
    assert "from before a hash of prompt_template and split, rows that were looked at was kept: it is not checked" in caplog.text


def test_packs_of_another_version_are_refused_with_what_can_be_done(
    loader: Loader, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = RowSizes(np.full(7, 20, np.int32), np.full(7, 2, np.int32))
    monkeypatch.setattr("datamodules.row_sizes.row_sizes", lambda *arguments: sizes)
    options = Batching("packed", max_tokens=64)
    packed, single = {"batching": options, "batch_size": 1}, {"batch_size": 1}
    state = loader(rows, **packed).state_dict()
    batching = re.escape(str(options))
    with pytest.raises(ValueError, match=rf"belongs to batching {batching} \(now None\), hash of the rows' sizes"):
        loader(rows, **single).load_state_dict(state)
    with pytest.raises(ValueError, match=rf"belongs to batching None \(now {batching}\): a run is resumed"):
        loader(rows, **packed).load_state_dict(loader(rows, **single).state_dict())
    monkeypatch.setattr("datamodules.data_order._WAY_OF_PACKING", 3)
    before = {name: value for name, value in state["order"].items() if name != "way of packing"}
    for order in (state["order"], before):
        with pytest.raises(ValueError, match=r"OmniLit that puts rows together .* from its weights with --model.init_from"):
            loader(rows, **packed).load_state_dict({**state, "order": order})


def test_a_source_without_rows_has_none_that_changed(caplog: pytest.LogCaptureFixture) -> None:
    def order(file: str, rows: str) -> dict[str, Any]:
        return {"rows that were looked at of clips": f"{file} {rows}"}

    check_order(order("01", ""), order("01", ""))
    check_order(order("01", ""), order("02", ""))
    for saved, now in (("", "0123"), ("0123", "")):
        with pytest.raises(ValueError, match="belongs to rows that were looked at of clips 01"):
            check_order(order("01", saved), order("02", now))
    assert not caplog.records


def test_the_state_of_many_rows_is_small(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_processor: Any
) -> None:
    path, number = tmp_path / "many.jsonl", 100_000
    path.write_text("".join(f'{{"question": "{row}", "answer": "yes"}}\n' for row in range(number)))
    sizes = RowSizes(np.full(number, 20, np.int32), np.zeros(number, np.int32))
    monkeypatch.setattr("datamodules.row_sizes.row_sizes", lambda *arguments: sizes)
    large = loader(path, "{question}", batching=Batching("packed"), batch_size=4)
    assert len(take(large, 2)) == 2 and large.row_counts()["trained"] > 800
    assert len(json.dumps(large.state_dict())) < 2_000


def test_a_file_s_hash_is_kept_with_its_index(rows: Path) -> None:
    for _ in range(2):
        assert JsonlFile(rows).sha256 == hashlib.sha256(rows.read_bytes()).hexdigest()
    rows.write_bytes(rows.read_bytes().replace(b"It is 5", b"It is 6"))
    assert JsonlFile(rows).sha256 == hashlib.sha256(rows.read_bytes()).hexdigest()
