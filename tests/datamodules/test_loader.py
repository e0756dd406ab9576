import gc
import json
import multiprocessing
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.batching import Batching
from datamodules.loader import Progress, RowLoader, StatefulLoader
from datamodules.skipped import SkippedRows
from tests.datamodules.loader_fakes import RecordingDataset, epochs, ids, make_loader, same, take
from tests.datamodules.row_fixtures import NUM_ROWS


def test_each_loop_is_the_next_epoch(recording_dataset: Callable[..., RecordingDataset]) -> None:
    loader = make_loader(recording_dataset())
    orders = [sum(ids(list(loader)), []) for _ in range(3)]
    assert all(sorted(order) == [str(row) for row in range(NUM_ROWS)] for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [epoch for epoch, _ in loader.dataset.requests()] == [0] * 7 + [1] * 7 + [2] * 7
    later = make_loader(recording_dataset())
    later.rows.set_epoch(2)
    assert sum(ids(list(later)), []) == orders[2]


def test_a_loop_that_was_left_early_is_over(recording_dataset: Callable[..., RecordingDataset]) -> None:
    loader, whole = make_loader(recording_dataset()), make_loader(recording_dataset())
    first, second = list(whole), list(whole)
    assert same(next(iter(loader)), first[0])
    assert all(same(*pair) for pair in zip(loader, second, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 8])
def test_a_new_loader_goes_on_where_the_old_one_stopped(
    recording_dataset: Callable[..., RecordingDataset], taken: int, num_workers: int
) -> None:
    whole = epochs(make_loader(recording_dataset()), 4)
    loader = make_loader(recording_dataset(), num_workers=num_workers)
    got = take(loader, taken)
    for _ in range(2):
        state = json.loads(json.dumps(loader.state_dict()))
        loader = make_loader(recording_dataset(), num_workers=num_workers)
        loader.load_state_dict(state)
        got += take(loader, 3)
    assert len(got) == taken + 6 and all(same(*pair) for pair in zip(got, whole, strict=False))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_reads_only_its_rest(recording_dataset: Callable[..., RecordingDataset], num_workers: int) -> None:
    loader = make_loader(recording_dataset(), num_workers=num_workers)
    read = sum(ids(take(loader, 2)), [])
    resumed = make_loader(rest := recording_dataset(), num_workers=num_workers)
    resumed.load_state_dict(loader.state_dict())
    assert len(list(resumed)) == 2
    assert sorted([*read, *(str(row) for _, row in rest.requests())]) == [str(row) for row in range(NUM_ROWS)]
    assert {epoch for epoch, _ in rest.requests()} == {0}


def test_workers_ahead_of_the_loop_do_not_count(recording_dataset: Callable[..., RecordingDataset]) -> None:
    loader = make_loader(recording_dataset(), num_workers=2)
    batches = iter(loader)
    next(batches)
    assert (loader.state_dict()["epoch"], loader.state_dict()["units"]) == (0, 2)
    assert loader.row_counts() == {"rows": 7, "trained": 2, "skipped": 0, "not_reached": 5, "dropped_tokens": 0}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generator_is_neither_read_nor_advanced(
    recording_dataset: Callable[..., RecordingDataset], num_workers: int
) -> None:
    loader = make_loader(recording_dataset(), num_workers=num_workers)
    before = torch.get_rng_state()
    first = list(loader)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again = make_loader(recording_dataset(), num_workers=num_workers)
    assert all(same(*pair) for pair in zip(again, first, strict=True))


def test_workers_stay_until_they_are_stopped(recording_dataset: Callable[..., RecordingDataset]) -> None:
    def workers() -> set[int | None]:
        return {process.pid for process in multiprocessing.active_children()} - others

    others: set[int | None] = set()
    others = workers()
    loader = make_loader(recording_dataset(), num_workers=2)
    seen = []
    for _ in range(2):
        list(loader)
        seen.append(workers())
    assert len(seen[0]) == 2 and seen[0] == seen[1]
    loader.stop_workers()
    assert workers() == set()
    assert len(list(loader)) == 4 and len(workers()) == 2
    loader.stop_workers()


def test_a_loader_that_is_dropped_is_freed_at_once(recording_dataset: Callable[..., RecordingDataset]) -> None:
    """And ends its workers: those of one that waits for the garbage collector are not told to end, and take 5 seconds each."""
    for batching in (Batching(), Batching("packed", max_tokens=80)):
        loader = make_loader(recording_dataset(), batching=batching)
        next(iter(loader))
        loader.state_dict()
        dropped = weakref.ref(loader)
        gc.disable()
        try:
            del loader
            assert dropped() is None
        finally:
            gc.enable()


def test_ranks_share_the_rows(recording_dataset: Callable[..., RecordingDataset]) -> None:
    one = ids(list(make_loader(recording_dataset(), batch_size=3)))
    ranks = [make_loader(recording_dataset(), batch_size=1, rank=rank, world_size=3) for rank in range(3)]
    parts = [ids(list(loader)) for loader in ranks]
    assert [sorted(sum(batches, [])) for batches in zip(*parts, strict=True)] == [sorted(batch) for batch in one]
    assert [loader.row_counts()["trained"] for loader in ranks] == [3, 2, 2]
    assert [loader.row_counts()["not_reached"] for loader in ranks] == [0, 0, 0]


def test_a_trainer_says_which_epoch_it_is_and_what_it_finished(recording_dataset: Callable[..., RecordingDataset]) -> None:
    whole = epochs(make_loader(recording_dataset()), 3)
    epoch, done = 2, 30
    loader = make_loader(recording_dataset(), progress=lambda: Progress(epoch, done))
    batches = iter(loader)
    assert same(next(batches), whole[8])
    assert loader.state_dict()["units"] == 0  # the trainer has the batch, and has not finished it
    done += 1
    assert loader.state_dict()["units"] == 2
    next(batches)
    state = loader.state_dict()
    resumed = make_loader(recording_dataset(), progress=lambda: Progress(epoch, done))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(same(*pair) for pair in zip(resumed, whole[9:], strict=True))
    assert resumed.row_counts()["trained"] == NUM_ROWS


def test_a_trainer_may_be_an_epoch_further(recording_dataset: Callable[..., RecordingDataset]) -> None:
    """As after `limit_train_batches`: an epoch ends in its middle, for the trainer."""
    whole = epochs(make_loader(recording_dataset()), 2)
    loader = make_loader(recording_dataset())
    take(loader, 2)
    resumed = make_loader(recording_dataset(), progress=lambda: Progress(1, 2))
    resumed.load_state_dict(loader.state_dict())
    assert all(same(*pair) for pair in zip(resumed, whole[4:], strict=True))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"seed": 4}, r"seed 3 \(now 4\)"),
        ({"batch_size": 3}, r"batch_size x processes x accumulate_grad_batches 2 \(now 3\)"),
        ({"world_size": 2}, r"batch_size x processes x accumulate_grad_batches 2 \(now 4\)"),
        ({"shuffle": False}, r"shuffle True \(now False\)"),
    ],
)
def test_a_place_in_another_order_is_refused(
    recording_dataset: Callable[..., RecordingDataset], options: dict[str, Any], change: str
) -> None:
    state = make_loader(recording_dataset()).state_dict()
    with pytest.raises(ValueError, match=f"{change}: a run is resumed with the data and options that it had.*model.init_from"):
        make_loader(recording_dataset(), **options).load_state_dict(state)


def test_a_place_in_other_data_is_refused(recording_dataset: Callable[..., RecordingDataset]) -> None:
    state = make_loader(recording_dataset()).state_dict()
    with pytest.raises(ValueError, match=r"training rows 7 \(now 3\)"):
        make_loader(recording_dataset(rows=[0, 4, 5])).load_state_dict(state)


def test_one_batch_on_one_process_is_two_halves_on_two(recording_dataset: Callable[..., RecordingDataset]) -> None:
    whole = make_loader(recording_dataset(), batch_size=2)
    state = (take(whole, 2), whole.state_dict())[1]
    parts = []
    for rank in range(2):
        part = make_loader(recording_dataset(), batch_size=1, rank=rank, world_size=2)
        part.load_state_dict(state)
        parts.append(sum(ids(list(part)), []))
    fresh = make_loader(recording_dataset(), batch_size=2)
    assert sorted(sum(parts, [])) == sorted(sum(ids(list(fresh)[2:]), []))


def test_an_evaluation_begins_at_its_first_row(recording_dataset: Callable[..., RecordingDataset]) -> None:
    skipped = {"": SkippedRows(None, "rows.jsonl", NUM_ROWS, 1.0)}
    loader = RowLoader(recording_dataset(), 2, skipped)
    assert ids([next(iter(loader))]) == [["0", "1"]]
    assert ids(list(loader)) == ids(list(loader)) == [["0", "1"], ["2", "3"], ["4", "5"], ["6"]]
    assert not isinstance(loader, (StatefulLoader, DataLoader))
