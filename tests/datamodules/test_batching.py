"""Batches of packs and of like lengths: the same rows for every number of processes, in every epoch all of them."""

from typing import Any

import numpy as np
import pytest
import torch

from datamodules.batching import Batching, pack_costs
from datamodules.packing import Packs, RowSizes, from_lists, halve, imbalance
from datamodules.portion import Portion
from datamodules.sampler import GlobalBatches, RowSampler

NUM_ROWS = 97
TOKENS = np.random.default_rng(0).integers(1, 60, NUM_ROWS)
SIZES = RowSizes(TOKENS, np.zeros_like(TOKENS))


def batches(batch_size: int, rank: int = 0, world_size: int = 1, epoch: int = 0, **options: Any) -> GlobalBatches:
    sampler = RowSampler([Portion(NUM_ROWS)], shuffle=True, seed=7)
    sampler.go_to(epoch, options.pop("start", 0))
    batching = Batching(**({"kind": "packed", "max_tokens": 64, "window": 40} | options))
    return GlobalBatches(sampler, batch_size, rank, world_size, batching, lambda: SIZES)


def packs_of(batch: list[Any]) -> list[frozenset[int]]:
    """The rows of each slot."""
    return [frozenset(key.row for key in batch if key.slot == slot) for slot in sorted({key.slot for key in batch})]


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_has_each_row_once(kind, epoch):
    keys = [key for batch in batches(3, epoch=epoch, kind=kind) for key in batch]
    assert sorted(key.row for key in keys) == list(range(NUM_ROWS))
    assert {key.epoch for key in keys} == {epoch}


def test_packs_fit_and_padded_batches_too():
    for batch in batches(3):
        for rows in packs_of(batch):
            assert sum(TOKENS[list(rows)]) <= 64
    for batch in batches(3, kind="padded", max_tokens=200):
        assert all(key.slot is None for key in batch)
        assert len(batch) * max(TOKENS[key.row] for key in batch) <= 200


@pytest.mark.parametrize("epoch", [0, 3])
def test_what_one_process_gets_several_get_together(epoch):
    alone = [packs_of(batch) for batch in batches(6, epoch=epoch)]
    for world_size in (2, 3, 6):
        ranks = [[*batches(6 // world_size, rank, world_size, epoch)] for rank in range(world_size)]
        assert {len(own) for own in ranks} == {len(alone)}
        for number, expected in enumerate(alone):
            together = [pack for own in ranks for pack in packs_of(own[number])]
            assert sorted(map(sorted, together)) == sorted(map(sorted, expected))


def test_each_epoch_has_as_many_batches_and_other_ones():
    first, second = [*batches(3)], [*batches(3, epoch=1)]
    assert len(first) == len(second) == len(batches(3, epoch=1))
    assert [packs_of(batch) for batch in first] != [packs_of(batch) for batch in second]


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize(("weight", "shuffle"), [(0.5, True), (1.3, True), (1.0, True), (0.25, False)])
def test_no_batch_is_larger_than_others_nor_empty_in_any_epoch(kind, weight, shuffle):
    """Half of the rows are other ones each epoch, which may need more packs than the first; a run has packs for them ready."""
    tokens = np.minimum(np.exp(np.random.default_rng(1).normal(4, 1, 2000)).astype(int) + 1, 400)
    sizes = RowSizes(np.sort(tokens), np.zeros_like(tokens))  # short rows first: without shuffling the last epoch is the longest
    sampler = RowSampler([Portion(1500, weight, seed=1), Portion(500)], shuffle, seed=7)
    own = GlobalBatches(sampler, 2, 0, 1, Batching(kind, 400), lambda: sizes)
    needed = set()
    for epoch in range(8):
        sampler.go_to(epoch, 0)
        expected = sampler.order()[:, 0]
        needed.add(len(own.batching.packs(sizes.take(expected.numpy()))))
        keys = [own._own(own._plan(epoch), batch) for batch in range(len(own))]
        limit = 1 if kind == "padded" else 2
        assert {len(units) for units in keys[:-1]} == {limit} and 1 <= len(keys[-1]) <= limit
        places = [[sizes.tokens_R[rows[:, 0].numpy()] for rows in units] for units in keys]
        most = [own.sum() if kind == "packed" else own.max() * len(own) for units in places for own in units]
        assert max(most) <= 400
        assert torch.equal(torch.cat([rows[:, 0] for units in keys for rows in units]).sort()[0], expected.sort()[0])
    assert max(needed) <= own.num_units <= 1.1 * max(needed)
    assert len(needed) > 1 or weight == 1.0


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_no_batch_is_larger_where_the_order_settles_how_many_are_needed(kind, weight):
    """As it does with `max_encoded`: which media meet in a batch is another one each epoch."""
    for seed in range(6):
        generator = np.random.default_rng(seed)
        num_rows = int(generator.integers(60, 400))
        encoded = np.where(generator.random(num_rows) < 0.7, generator.integers(16, 700, num_rows), 0)
        sizes = RowSizes(generator.integers(10, (50, 160)[seed % 2], num_rows), encoded)
        sampler = RowSampler([Portion(num_rows, weight, seed)], True, seed)
        own = GlobalBatches(sampler, 1, 0, 1, Batching(kind, 2048, 1024), lambda sizes=sizes: sizes)
        needed = []
        for epoch in range(8):
            needed.append(len(own.batching.packs(sizes.take(sampler.order(epoch)[:, 0].numpy()))))
            units = [own._own(own._plan(epoch), batch) for batch in range(len(own))]
            assert {len(keys) for keys in units} == {1}
            rows = [keys[0][:, 0].numpy() for keys in units]
            assert max(sizes.encoded_R[own].sum() for own in rows) <= 1024
            places = [sizes.tokens_R[own] for own in rows]
            assert max(own.sum() if kind == "packed" else own.max() * len(own) for own in places) <= 2048
        if weight == 1.0:  # otherwise much of it is for other rows
            assert own.num_units <= 1.1 * max(needed) + 2


def test_as_many_packs_as_are_wanted_have_the_same_rows():
    generator = np.random.default_rng(3)
    lists = [np.array([4, 2, 0]), np.array([1]), np.array([3, 5])]
    for num_packs, expected in ((2, 3), (4, 4), (5, 5), (9, 6)):
        halves = halve(lists, num_packs, generator)
        assert len(halves) == expected and sorted(np.concatenate(halves).tolist()) == [0, 1, 2, 3, 4, 5]


def test_what_does_not_fit_is_spread_over_the_epoch(caplog):
    """No step is much larger than another, even where 4 standard deviations were too few."""
    own = batches(2, epoch=2)
    own.num_units = 20  # as if an epoch needed twice as many
    taken = [packs_of(batch) for batch in own]
    assert len(taken) == 10 and max(map(len, taken)) <= min(map(len, taken)) + 1
    assert "epoch 2 needs" in caplog.text
    assert sorted(row for batch in taken for rows in batch for row in rows) == list(range(NUM_ROWS))
    ranks = [[*GlobalBatches(own.sampler, 1, rank, 2, own.batching, lambda: SIZES)] for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])


@pytest.mark.parametrize("like_cost", [False, True])
def test_steps_are_alike_and_what_is_computed_at_one_time_too(like_cost):
    """Half of the rows hold a picture. Packs by their cost alone would make steps of pictures and steps of texts."""
    generator = np.random.default_rng(0)
    has_picture = generator.random(15_000) < 0.5
    text = np.minimum(np.exp(generator.normal(6.3, 1.0, 15_000)).astype(int) + 8, 4096)
    caption = np.minimum(np.exp(generator.normal(4.6, 0.9, 15_000)).astype(int) + 8, 3000)
    sizes = RowSizes(np.where(has_picture, 576 + caption, text), np.where(has_picture, 576, 0))
    batching = Batching("packed", like_cost=like_cost)
    packs = batching.packs(sizes)
    units = batching.units(packs, sizes, len(packs), 512, 3)

    def shares(packs: Packs) -> np.ndarray:
        tokens = np.stack([packs.sums(np.where(has_picture, sizes.tokens_R, 0)), packs.sums(sizes.tokens_R)])
        whole = tokens[:, : len(packs) // 512 * 512].reshape(2, -1, 512).sum(2)
        return whole[0] / whole[1]

    at_random = from_lists([packs.lists()[place] for place in generator.permutation(len(packs))])
    assert shares(at_random).std() < 0.02
    if like_cost:
        assert shares(units).std() > 0.1
    else:
        assert shares(units).std() < 0.03
    costs = pack_costs(units, sizes)
    assert imbalance(pack_costs(at_random, sizes), 64) > 1.15
    assert imbalance(costs, 64) < 1.04  # of 64 processes with 8 packs a step each


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weight", [0.3, 0.5, 1.0, 1.7, 2.0])
def test_what_an_epoch_adds_up_to(weight, shuffle):
    values = np.random.default_rng(5).exponential(size=60)
    sums = []
    for seed in range(200):
        portion = Portion(60, weight, seed)
        sums += [values[portion.rows(epoch, shuffle)[:, 0].numpy()].sum() for epoch in range(6)]
    mean, variance = portion.expected(values, shuffle)
    if not shuffle or weight in (1.0, 2.0):
        assert variance == 0 and max(sums) <= mean * (1 + 1e-9)
        assert shuffle or mean <= values.sum() * weight * 2
    else:
        assert np.mean(sums) == pytest.approx(mean, rel=0.02)
        assert 0.6 * variance < np.var(sums) < 1.1 * variance
        assert max(sums) < mean + 4 * variance**0.5


def test_a_run_goes_on_in_the_middle_of_an_epoch():
    whole = [*batches(3, epoch=2)]
    assert [*batches(3, epoch=2, start=4)] == whole[4:]


def test_own_rows_are_those_that_were_handed_out():
    own = batches(2, rank=1, world_size=2, epoch=1)
    handed_out = [key.row for batch in [*own][:3] for key in batch]
    (rows,) = own.own_rows(3)
    assert rows.tolist() == handed_out
    assert sum(map(len, own.own_rows(0))) == 0


def test_options_out_of_range_are_refused():
    for name in ("max_tokens", "window", "max_encoded"):
        with pytest.raises(ValueError, match=rf"data\.batching\.{name} must be at least 1, got 0"):
            Batching(**{name: 0})


def test_rows_are_batches_as_before():
    sampler = RowSampler([Portion(5)], shuffle=False, seed=0)
    assert [[key.row for key in batch] for batch in GlobalBatches(sampler, 2)] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.cat(GlobalBatches(sampler, 2).own_rows(3)), torch.arange(5))
