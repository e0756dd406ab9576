"""Packs: nothing lost, nothing too full, few of them, and the same for the same sizes."""

import numpy as np
import pytest

from datamodules.packing import RowSizes, balance, best_fit, from_lists, imbalance, similar_lengths


def sizes_of(tokens: list[int], encoded: list[int] | None = None) -> RowSizes:
    return RowSizes(np.array(tokens), np.array(encoded if encoded is not None else [0] * len(tokens)))


def lists(packs) -> list[list[int]]:
    return [rows.tolist() for rows in packs.lists()]


def test_the_longest_goes_first_and_each_into_the_fullest_pack_with_room():
    assert lists(best_fit(sizes_of([3, 7, 5, 2, 3]), max_tokens=10)) == [[1, 0], [2, 4, 3]]
    assert lists(best_fit(sizes_of([6, 6, 4, 3, 1]), max_tokens=10)) == [[0, 3, 4], [1, 2]]


def test_a_row_that_is_longer_than_a_pack_stands_alone():
    assert lists(best_fit(sizes_of([4, 25, 6]), max_tokens=10)) == [[1], [2, 0]]


def test_rows_without_a_size_are_there_too():
    assert lists(best_fit(sizes_of([0, 10, 0]), max_tokens=10)) == [[1, 0, 2]]
    assert lists(best_fit(sizes_of([]), max_tokens=10)) == []


def test_a_pack_holds_no_more_for_encoders_than_it_may():
    packs = lists(best_fit(sizes_of([5, 3, 2], [8, 8, 1]), max_tokens=10, max_encoded=10))
    assert packs == [[0, 2], [1]]


@pytest.mark.parametrize("max_encoded", [None, 900])
def test_random_rows_are_all_there_once_and_packs_are_full(max_encoded):
    generator = np.random.default_rng(3)
    tokens = np.minimum(np.exp(generator.normal(5, 1, 4000)).astype(int) + 1, 2048)
    encoded = np.where(generator.random(4000) < 0.5, 256, 0)
    sizes = RowSizes(tokens, encoded)
    packs = best_fit(sizes, 2048, max_encoded)
    assert sorted(packs.rows_R.tolist()) == list(range(4000))
    assert packs.sums(tokens).max() <= 2048
    assert packs.sums(tokens).tolist() == [int(tokens[rows].sum()) for rows in packs.lists()]
    if max_encoded is None:
        assert tokens.sum() / (len(packs) * 2048) > 0.99
    else:
        assert packs.sums(encoded).max() <= max_encoded
        assert encoded.sum() / (len(packs) * max_encoded) > 0.7  # with three pictures of 256 it would be 0.85
    assert np.array_equal(best_fit(sizes, 2048, max_encoded).rows_R, packs.rows_R)


def test_many_rows_of_one_length_take_no_longer_than_others():
    """Packs with equal room must not be searched one by one: with 400,000 of them that would take hours."""
    tokens = np.concatenate([np.full(400_000, 700), np.full(400_000, 300)])
    packs = best_fit(RowSizes(tokens, np.zeros_like(tokens)), 1000)
    assert len(packs) == 400_000


def test_groups_of_like_length_fit_with_their_padding():
    generator = np.random.default_rng(4)
    tokens = generator.integers(1, 300, 1000)
    groups = similar_lengths(RowSizes(tokens, np.ones_like(tokens)), max_tokens=2000, max_encoded=12)
    assert sorted(groups.rows_R.tolist()) == list(range(1000))
    for rows in groups.lists():
        assert tokens[rows].max() * len(rows) <= 2000
        assert len(rows) <= 12
    assert lists(similar_lengths(sizes_of([5, 3, 5, 3]), max_tokens=10)) == [[1, 3], [0, 2]]


def test_what_comes_at_one_time_costs_about_the_same():
    generator = np.random.default_rng(5)
    costs = np.exp(generator.normal(0, 0.5, 6400))
    order = balance(costs, 64, np.random.default_rng(1))
    assert sorted(order.tolist()) == list(range(6400))
    assert imbalance(costs, 64) > 2
    assert imbalance(costs[order], 64) < 1.06
    assert not np.array_equal(order, balance(costs, 64, np.random.default_rng(2)))


def test_imbalance_by_hand():
    assert imbalance(np.array([1.0, 3.0, 2.0, 2.0, 9.0]), 2) == pytest.approx((3 + 2) / (2 + 2))


def test_lists_and_packs_are_the_same():
    packs = from_lists([[3, 1], [], [2]])
    assert lists(packs) == [[3, 1], [], [2]]
    assert packs.sums(np.array([0, 10, 20, 30])).tolist() == [40, 0, 20]
