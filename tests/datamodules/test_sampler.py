import itertools

import pytest
import torch

from datamodules.dataset import RowKey
from datamodules.sampler import GlobalBatches, RowSampler


def epoch(sampler: RowSampler, batch_size: int = 2, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    return [[key.row for key in batch] for batch in GlobalBatches(sampler, batch_size, rank, world_size)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 3), (7, 2), (12, 3), (25, 4), (29, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_row_comes_once_an_epoch(world_size: int, num_rows: int, batch_size: int, shuffle: bool) -> None:
    ranks = [epoch(RowSampler(num_rows, shuffle, seed=9), batch_size, rank, world_size) for rank in range(world_size)]
    rows = [row for rank in ranks for batch in rank for row in batch]
    assert sorted(rows) == list(range(num_rows))
    assert {len(batches) for batches in ranks} == {-(-num_rows // (batch_size * world_size))}
    for rank, batches in enumerate(ranks):
        assert all(len(batch) == batch_size for batch in batches[:-1])
        sampler = GlobalBatches(RowSampler(num_rows, shuffle, seed=9), batch_size, rank, world_size)
        assert len(sampler) == len(batches) and sampler.num_rows() == sum(map(len, batches))
    last = [len(batches[-1]) for batches in ranks]
    assert max(last) - min(last) <= 1


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 4), (2, 2)])
def test_several_ranks_share_the_batches_of_one(batch_size: int, world_size: int) -> None:
    one = epoch(RowSampler(23, True, seed=4), 4)
    ranks = [epoch(RowSampler(23, True, seed=4), batch_size, rank, world_size) for rank in range(world_size)]
    for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert sorted(batch) == sorted(itertools.chain(*parts))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, number: int) -> list[int]:
        sampler = RowSampler(40, True, seed)
        sampler.set_epoch(number)
        return sampler.order().tolist()

    orders = {(seed, number): order(seed, number) for seed in (0, 1, 42) for number in (0, 1, 2)}
    assert {key: order(*key) for key in reversed(orders)} == orders
    assert len({tuple(rows) for rows in orders.values()}) == len(orders)
    assert all(sorted(rows) == list(range(40)) for rows in orders.values())


def test_without_shuffle_the_order_is_that_of_the_file() -> None:
    sampler = RowSampler(5, False, seed=4)
    sampler.set_epoch(3)
    assert epoch(sampler) == [[0, 1], [2, 3], [4]]
    assert list(sampler) == [RowKey(row, 3) for row in range(5)] and len(sampler) == 5


def test_the_rest_of_an_epoch_is_the_end_of_the_whole() -> None:
    whole = epoch(RowSampler(11, True, seed=2))
    for batch in range(len(whole) + 1):
        sampler = RowSampler(11, True, seed=2)
        sampler.go_to(0, batch)
        assert epoch(sampler) == whole[batch:]


def test_an_epoch_under_way_keeps_its_number() -> None:
    sampler = RowSampler(6, True, seed=2)
    batches = iter(GlobalBatches(sampler, 2))
    first = next(batches)
    sampler.set_epoch(8)
    assert {key.epoch for batch in [first, *batches] for key in batch} == {0}
    assert {key.epoch for batch in GlobalBatches(sampler, 2) for key in batch} == {8}


def test_set_epoch_keeps_the_place_in_the_same_epoch_only() -> None:
    sampler = RowSampler(6, True, seed=2)
    sampler.go_to(4, 1)
    sampler.set_epoch(4)
    assert (sampler.epoch, sampler.batch) == (4, 1)
    sampler.set_epoch(5)
    assert (sampler.epoch, sampler.batch) == (5, 0)


def test_begin_goes_on_at_a_place_once() -> None:
    sampler = RowSampler(6, True, seed=2)
    places = []
    for place in (None, (4, 1), None, (4, 3), (2, 0)):
        if place is not None:
            sampler.go_to(*place)
        sampler.begin(num_batches=3)
        places.append((sampler.epoch, sampler.batch))
    assert places == [(0, 0), (4, 1), (5, 0), (5, 0), (2, 0)]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    one = epoch(RowSampler(30, True, seed=7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(int(torch.initial_seed()) + 1)
    assert epoch(RowSampler(30, True, seed=7)) == one
