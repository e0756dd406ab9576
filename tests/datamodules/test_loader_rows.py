"""The account of the rows: each is trained or named, whatever happens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.loader import Progress
from datamodules.processor import Processor, PromptOptions
from tests.datamodules.loader_fakes import RecordingDataset, epochs, ids, make_loader, make_processor, make_row, take
from tests.datamodules.row_fixtures import NUM_ROWS


def bad_lines(folder: Path) -> dict[int, str]:
    """A bad picture, malformed JSON, a row that is too long, and a missing file."""
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no picture")
    return {
        0: json.dumps(make_row(0, "bad.png")),
        2: '{"messages": [}',
        3: json.dumps(make_row(3, "3.png", answer="very " * 900)),
        5: json.dumps(make_row(5, "missing.png")),
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_is_trained_or_named(
    recording_dataset: Callable[..., RecordingDataset], tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make_loader(recording_dataset(bad_lines(tmp_path)), folder=tmp_path, num_workers=num_workers)
    for _ in range(3):
        trained = sum(ids(list(loader)), [])
        assert sorted(trained) == ["1", "4", "6"]
        assert loader.row_counts() == {"rows": 7, "trained": 3, "skipped": 4, "not_reached": 0, "dropped_tokens": 0}
    named = {row["line"]: row for row in map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())}
    reasons = {1: "bad.png", 3: "not JSON", 4: "above prompt.max_length = 2,048", 6: "missing.png does not exist"}
    assert sorted(named) == sorted(reasons)
    assert all(reason in named[line]["reason"] for line, reason in reasons.items())
    assert {row["file"] for row in named.values()} == {str(tmp_path / "rows.jsonl")}
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 4
    counted = [int(record.getMessage().split()[1]) for record in caplog.records if record.getMessage().startswith("skipped")]
    assert sum(counted) == 4


@pytest.mark.parametrize("taken", [1, 2, 3, 4, 6])
def test_the_account_goes_on_after_a_resume(
    recording_dataset: Callable[..., RecordingDataset], tmp_path: Path, taken: int
) -> None:
    loader = make_loader(recording_dataset(bad_lines(tmp_path)), folder=tmp_path)
    take(loader, taken)
    counts = loader.row_counts()
    assert counts["trained"] + counts["skipped"] + counts["not_reached"] == counts["rows"] == NUM_ROWS
    resumed = make_loader(recording_dataset(bad_lines(tmp_path)), folder=tmp_path)
    resumed.load_state_dict(loader.state_dict())
    list(resumed)
    assert resumed.row_counts() == {"rows": 7, "trained": 3, "skipped": 4, "not_reached": 0, "dropped_tokens": 0}
    list(resumed)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 4


def test_a_bad_row_leaves_a_gap_in_its_batch(recording_dataset: Callable[..., RecordingDataset], tmp_path: Path) -> None:
    good = epochs(make_loader(recording_dataset()), 2)
    gaps = epochs(make_loader(recording_dataset(bad_lines(tmp_path))), 2)
    bad = {"0", "2", "3", "5"}
    assert ids(gaps) == [[row for row in batch if row not in bad] for batch in ids(good)]
    pictures = {(number // 4, example["id"]): row for number, batch in enumerate(good) for example, row in rows(batch)}
    for number, batch in enumerate(gaps):
        for example, (tokens, labels, picture) in rows(batch):
            expected = pictures[number // 4, example["id"]]
            assert (tokens, labels) == expected[:2] and torch.equal(picture, expected[2])


def rows(batch: Any) -> list[tuple[dict[str, Any], tuple[list[int], list[int], torch.Tensor]]]:
    """Each example with its tokens, labels and picture, without padding."""
    if not batch["examples"]:
        return []
    real = batch["segments_BT"] > 0
    pictures = batch["image"]["media"][batch["image"]["item_O"]]
    return [
        (example, (batch["tokens_BT"][row][real[row]].tolist(), batch["labels_BT"][row][real[row]].tolist(), pictures[row]))
        for row, example in enumerate(batch["examples"])
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_rows_stop_the_run(
    recording_dataset: Callable[..., RecordingDataset], tmp_path: Path, num_workers: int
) -> None:
    bad = bad_lines(tmp_path)
    loader = make_loader(recording_dataset(bad), folder=tmp_path, max_skipped=0.5, num_workers=num_workers)
    with pytest.raises(
        ValueError,
        match=r"^4 of 7 rows \(57\.1 %\) from .*rows\.jsonl could not be used.* allows 3\. .*or raise data\.max_skipped$",
    ):
        list(loader)
    enough = make_loader(recording_dataset(bad), folder=tmp_path, max_skipped=4 / 7)
    assert len(epochs(enough, 3)) == 12


def test_the_batch_that_stops_the_run_is_not_lost(recording_dataset: Callable[..., RecordingDataset], tmp_path: Path) -> None:
    loader = make_loader(recording_dataset(bad_lines(tmp_path)), max_skipped=0.0, progress=lambda: Progress(0, len(finished)))
    finished: list[Any] = []
    with pytest.raises(ValueError, match="data.max_skipped = 0.0 allows 0"):
        finished.extend(loader)
    state = loader.state_dict()
    mended = make_loader(recording_dataset())
    mended.load_state_dict(state)
    rest = list(mended)
    assert mended.row_counts()["trained"] == NUM_ROWS and sum(map(len, ids(rest))) == NUM_ROWS - 2 * len(finished)


def test_media_are_counted_as_they_are_delivered(recording_dataset: Callable[..., RecordingDataset], tmp_path: Path) -> None:
    twice = make_row(4, "4.png")
    twice["messages"][0]["content"] = "<image>like<image>?"
    twice["images"] *= 2
    lines = {1: json.dumps(make_row(1)), 4: json.dumps(twice), 5: json.dumps(make_row(5, "missing.png"))}
    loader = make_loader(recording_dataset(lines), num_workers=1)
    assert loader.media_counts() == {"image": 0, "video": 0, "audio": 0}
    for _ in range(2):
        delivered = 0
        for batch in loader:
            delivered += sum({"1": 0, "4": 2}.get(example["id"], 1) for example in batch["examples"])
            assert loader.media_counts()["image"] == delivered
        assert loader.media_counts() == {"image": 6, "video": 0, "audio": 0}
    take(loader, 2)
    resumed = make_loader(recording_dataset(lines))
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert resumed.media_counts() == loader.media_counts() != {"image": 6, "video": 0, "audio": 0}
    list(resumed)
    assert resumed.media_counts()["image"] == 6


def test_cut_tokens_are_counted(
    recording_dataset: Callable[..., RecordingDataset], row_processor: Processor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(row_processor.name_or_path)
    whole = [len(row.tokens) for row in (recording_dataset()[number] for number in range(NUM_ROWS))]
    limit = max(whole) - 3
    cutting = make_processor(folder, PromptOptions(max_length=limit, on_too_long="cut"))
    dropped = sum(max(0, length - limit) for length in whole)
    loader = make_loader(recording_dataset(processor=cutting))
    batches = epochs(loader, 2)
    assert loader.row_counts()["dropped_tokens"] == dropped == sum(batch["num_dropped_tokens"] for batch in batches[:4]) > 0
    messages = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert 1 <= len(messages) <= 4 and int(messages[-1].split()[0]) * 2 > dropped
    resumed = make_loader(recording_dataset(processor=cutting))
    resumed.load_state_dict({**loader.state_dict(), "units": 4, "counts": {"dropped_tokens": 100}})
    list(resumed)
    rest = sum(batch["num_dropped_tokens"] for batch in batches[6:])
    assert resumed.row_counts()["dropped_tokens"] == 100 + rest


def test_a_batch_whose_rows_are_all_bad_is_empty(recording_dataset: Callable[..., RecordingDataset], tmp_path: Path) -> None:
    loader = make_loader(recording_dataset(bad_lines(tmp_path)), batch_size=1)
    batches = list(loader)
    assert sorted(map(len, ids(batches))) == [0, 0, 0, 0, 1, 1, 1]
    assert all(len(batch["skipped"]) + len(batch["examples"]) == 1 for batch in batches)
