import itertools
import math
from collections import Counter

import pytest
import torch

from datamodules.portion import Portion
from datamodules.row_dataset import RowKey
from datamodules.sampler import GlobalBatches, RowSampler


def one_source(num_rows: int, shuffle: bool, seed: int) -> RowSampler:
    return RowSampler([Portion(num_rows)], shuffle, seed)


def epoch(sampler: RowSampler, batch_size: int = 2, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    return [[key.row for key in batch] for batch in GlobalBatches(sampler, batch_size, rank, world_size)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 3), (7, 2), (12, 3), (25, 4), (29, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_row_comes_once_an_epoch(world_size: int, num_rows: int, batch_size: int, shuffle: bool) -> None:
    ranks = [epoch(one_source(num_rows, shuffle, seed=9), batch_size, rank, world_size) for rank in range(world_size)]
    rows = [row for rank in ranks for batch in rank for row in batch]
    assert sorted(rows) == list(range(num_rows))
    assert {len(batches) for batches in ranks} == {-(-num_rows // (batch_size * world_size))}
    for rank, batches in enumerate(ranks):
        assert all(len(batch) == batch_size for batch in batches[:-1])
        sampler = GlobalBatches(one_source(num_rows, shuffle, seed=9), batch_size, rank, world_size)
        assert len(sampler) == len(batches) and list(map(len, sampler.own_rows(len(batches)))) == [sum(map(len, batches))]
    last = [len(batches[-1]) for batches in ranks]
    assert max(last) - min(last) <= 1


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 4), (2, 2)])
def test_several_ranks_share_the_batches_of_one(batch_size: int, world_size: int) -> None:
    one = epoch(one_source(23, True, seed=4), 4)
    ranks = [epoch(one_source(23, True, seed=4), batch_size, rank, world_size) for rank in range(world_size)]
    for batch, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert sorted(batch) == sorted(itertools.chain(*parts))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, number: int) -> list[int]:
        sampler = one_source(40, True, seed)
        sampler.set_epoch(number)
        return sampler.order()[:, 0].tolist()

    orders = {(seed, number): order(seed, number) for seed in (0, 1, 42) for number in (0, 1, 2)}
    assert {key: order(*key) for key in reversed(orders)} == orders
    assert len({tuple(rows) for rows in orders.values()}) == len(orders)
    assert all(sorted(rows) == list(range(40)) for rows in orders.values())


def test_without_shuffle_the_order_is_that_of_the_file() -> None:
    sampler = one_source(5, False, seed=4)
    sampler.set_epoch(3)
    assert epoch(sampler) == [[0, 1], [2, 3], [4]]
    assert list(sampler) == [RowKey(row, 3) for row in range(5)] and len(sampler) == 5


def test_the_rest_of_an_epoch_is_the_end_of_the_whole() -> None:
    whole = epoch(one_source(11, True, seed=2))
    for batch in range(len(whole) + 1):
        sampler = one_source(11, True, seed=2)
        sampler.go_to(0, batch)
        assert epoch(sampler) == whole[batch:]


def test_an_epoch_under_way_keeps_its_number() -> None:
    sampler = one_source(6, True, seed=2)
    batches = iter(GlobalBatches(sampler, 2))
    first = next(batches)
    sampler.set_epoch(8)
    assert {key.epoch for batch in [first, *batches] for key in batch} == {0}
    assert {key.epoch for batch in GlobalBatches(sampler, 2) for key in batch} == {8}


def test_set_epoch_keeps_the_place_in_the_same_epoch_only() -> None:
    sampler = one_source(6, True, seed=2)
    sampler.go_to(4, 1)
    sampler.set_epoch(4)
    assert (sampler.epoch, sampler.batch) == (4, 1)
    sampler.set_epoch(5)
    assert (sampler.epoch, sampler.batch) == (5, 0)


def test_begin_goes_on_at_a_place_once() -> None:
    sampler = one_source(6, True, seed=2)
    places = []
    for place in (None, (4, 1), None, (4, 3), (2, 0)):
        if place is not None:
            sampler.go_to(*place)
        sampler.begin(num_batches=3)
        places.append((sampler.epoch, sampler.batch))
    assert places == [(0, 0), (4, 1), (5, 0), (5, 0), (2, 0)]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    one = epoch(one_source(30, True, seed=7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(int(torch.initial_seed()) + 1)
    assert epoch(one_source(30, True, seed=7)) == one


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weight", [0.1, 0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 3.3])
def test_no_row_comes_again_before_all_have_come_as_often(weight: float, shuffle: bool) -> None:
    """A pass has each row once, whatever the weight, and an epoch always has as many rows."""
    portion = Portion(11, weight, seed=3)
    seen: Counter[int] = Counter()
    for number in range(12):
        keys = portion.rows(number, shuffle).tolist()
        assert len(keys) == portion.num_rows_an_epoch == max(1, math.floor(11 * weight + 0.5))
        for row, earlier in keys:
            assert seen[row] == earlier  # the pass says how often the row has come before
            seen[row] += 1
        assert max(seen.values()) - min(seen[row] for row in range(11)) <= 1


def test_a_part_of_a_pass_is_drawn_and_the_next_epoch_takes_the_rest() -> None:
    halves = [[row for row, _ in Portion(10, 0.5, seed=3).rows(number, shuffle=True).tolist()] for number in range(4)]
    assert sorted(halves[0] + halves[1]) == sorted(halves[2] + halves[3]) == list(range(10))
    assert set(halves[0]) != set(halves[2]) and halves[0] != sorted(halves[0])
    assert Portion(10, 0.5, seed=3).rows(1, shuffle=False)[:, 0].tolist() == [5, 6, 7, 8, 9]


def mixture(shuffle: bool = True) -> RowSampler:
    return RowSampler([Portion(5, 1.0, 1), Portion(8, 0.5, 2), Portion(3, 2.0, 3)], shuffle, seed=4)


def test_sources_are_mixed_with_their_weights() -> None:
    sampler = mixture()
    orders = []
    for number in range(4):
        sampler.set_epoch(number)
        orders.append([tuple(key) for key in sampler])
        of_source = [sum(start <= row < end for row, *_ in orders[-1]) for start, end in ((0, 5), (5, 13), (13, 16))]
        assert of_source == [5, 4, 6] and len(sampler) == 15
        assert {earlier for row, earlier, _ in orders[-1] if row >= 13} == {2 * number, 2 * number + 1}
    assert len({tuple(order) for order in orders}) == 4
    assert any(orders[0][i][0] >= 5 > orders[0][i + 1][0] for i in range(14))  # not one source after the other
    # rows 0 to 4 of the first source at 1/10, 3/10, ... of the epoch, 5 to 8 at 1/8, 3/8, ..., 13 to 15 twice at 1/12, 3/12, ...
    assert [row for row, *_ in mixture(shuffle=False)] == [13, 0, 5, 14, 1, 6, 15, 2, 13, 7, 3, 14, 8, 4, 15]


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_share_the_batches_of_a_mixture(batch_size: int, world_size: int) -> None:
    whole = epoch(mixture(), 4)
    totals: Counter[int] = Counter()
    ranks = [GlobalBatches(mixture(), batch_size, rank, world_size) for rank in range(world_size)]
    parts = [list(batches) for batches in ranks]
    for batch, of_ranks in zip(whole, zip(*parts, strict=True), strict=True):
        assert sorted(batch) == sorted(key.row for part in of_ranks for key in part)
    for batches, part in zip(ranks, parts, strict=True):
        for number in range(len(part) + 1):
            rows = [key.row for batch in part[:number] for key in batch]
            of_sources = [[row - start for row in rows if start <= row < end] for start, end in ((0, 5), (5, 13), (13, 16))]
            assert [own.tolist() for own in batches.own_rows(number)] == of_sources
        totals.update({source: len(own) for source, own in enumerate(of_sources)})
    assert totals == {0: 5, 1: 4, 2: 6}


def test_the_rest_of_an_epoch_of_a_mixture_is_the_end_of_the_whole() -> None:
    for number, batch in ((0, 2), (3, 0), (3, 5)):
        whole, rest = mixture(), mixture()
        whole.go_to(number, 0)
        rest.go_to(number, batch)
        assert list(GlobalBatches(rest, 3)) == list(GlobalBatches(whole, 3))[batch:]
