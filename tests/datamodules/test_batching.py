"""Batches of packs and of like lengths: the same rows for every number of processes, in every epoch all of them."""

from typing import Any

import numpy as np
import pytest
import torch

from datamodules.batching import Batching
from datamodules.packing import RowSizes
from datamodules.sampler import GlobalBatches, Portion, RowSampler

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


def test_no_row_is_lost_where_another_epoch_needs_more_packs_or_fewer():
    """What is left over goes into the last batch, and where too little is there the last batches are empty."""
    for num_batches in (2, 60):
        own = batches(2, epoch=2)
        own.num_units = num_batches * own.global_size  # as if the first epoch had needed so many
        taken = [packs_of(batch) for batch in own]
        assert len(taken) == num_batches
        assert len(taken[0]) == 2
        assert sorted(row for batch in taken for rows in batch for row in rows) == list(range(NUM_ROWS))


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
