"""Packs: nothing lost, nothing too full, few of them, and the same for the same sizes."""

import numpy as np
import pytest

from datamodules.exact_fit import exact_fit
from datamodules.packing import (
    RowSizes,
    balance,
    best_fit,
    by_cost_in_steps,
    fewest_packs,
    from_lists,
    imbalance,
    pack,
    similar_lengths,
)


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
    assert lists(pack(sizes_of([0, 10, 0]), max_tokens=10)) == [[1, 0, 2]]
    assert sorted(map(len, lists(pack(sizes_of([0, 25, 0, 4]), max_tokens=10)))) == [1, 3]
    assert lists(best_fit(sizes_of([0, 10, 0]), max_tokens=10)) == [[1, 0, 2]]
    assert lists(best_fit(sizes_of([]), max_tokens=10)) == []


def test_a_pack_holds_no_more_for_encoders_than_it_may():
    packs = lists(best_fit(sizes_of([5, 3, 2], [8, 8, 1]), max_tokens=10, max_encoded=10))
    assert packs == [[0, 2], [1]]


def test_no_fewer_packs_by_hand():
    assert fewest_packs(np.array([3, 7, 5, 2, 3]), 10) == 2  # 20 tokens
    assert fewest_packs(np.array([6, 6, 6, 1]), 10) == 3  # each above one half
    assert fewest_packs(np.array([7, 6, 5, 5, 4]), 10) == 3  # 27 tokens
    assert fewest_packs(np.array([6, 6, 5, 5, 5]), 10) == 4  # 27 tokens, but no 5 goes with a 6
    assert fewest_packs(np.array([25, 6, 4, 0]), 10) == 2
    assert fewest_packs(np.array([], np.int64), 10) == 0


def fewest_by_trying(tokens: list[int], max_tokens: int) -> int:
    """The number of packs that are needed, by trying each place of each row."""
    best = len(tokens)

    def place(number: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if number == len(tokens):
            best = len(rooms)
            return
        for at, room in enumerate(rooms):
            if room >= tokens[number]:
                place(number + 1, (*rooms[:at], room - tokens[number], *rooms[at + 1 :]))
        place(number + 1, (*rooms, max_tokens - tokens[number]))

    place(0, ())
    return best


def test_the_bound_is_below_what_is_needed_and_packs_are_near_it():
    generator = np.random.default_rng(6)
    needed, used, bound = 0, 0, 0
    for _ in range(40):
        tokens = generator.integers(1, 20, 8)
        fewest = fewest_by_trying(tokens.tolist(), 24)
        packs = pack(RowSizes(tokens, np.zeros_like(tokens)), 24)
        assert fewest_packs(tokens, 24) <= fewest <= len(packs)
        needed, used, bound = needed + fewest, used + len(packs), bound + fewest_packs(tokens, 24)
    assert used <= 1.05 * needed and bound >= 0.95 * needed


def test_packs_are_full_to_the_last_token():
    """Pictures of 576 tokens and a text: five rows or six fill a pack, and best fit leaves 6 % of it empty."""
    text = np.exp(np.random.default_rng(7).normal(4.6, 0.9, 4000)).astype(int) + 8
    tokens = np.minimum(576 + text, 4096)
    packs = exact_fit(tokens, 4096)
    assert sorted(row for rows in packs for row in rows) == list(range(4000))
    assert max(tokens[rows].sum() for rows in packs) <= 4096
    assert len(packs) <= 1.005 * fewest_packs(tokens, 4096)
    assert len(best_fit(RowSizes(tokens, tokens), 4096)) > 1.05 * len(packs)
    assert exact_fit(tokens, 4096) == packs


def test_where_lengths_are_few_and_long_best_fit_is_taken():
    generator = np.random.default_rng(8)
    tokens = generator.integers(1, 4097, 3000)
    sizes = RowSizes(tokens, np.zeros_like(tokens))
    packs = pack(sizes, 4096)
    assert len(packs) == len(best_fit(sizes, 4096)) < len(exact_fit(tokens, 4096))


@pytest.mark.parametrize("make", [best_fit, pack])
@pytest.mark.parametrize("max_encoded", [None, 900])
def test_random_rows_are_all_there_once_and_packs_are_full(make, max_encoded):
    generator = np.random.default_rng(3)
    tokens = np.minimum(np.exp(generator.normal(5, 1, 4000)).astype(int) + 1, 2048)
    encoded = np.where(generator.random(4000) < 0.5, 256, 0)
    sizes = RowSizes(tokens, encoded)
    packs = make(sizes, 2048, max_encoded)
    assert sorted(packs.rows_R.tolist()) == list(range(4000))
    assert packs.sums(tokens).max() <= 2048
    assert packs.sums(tokens).tolist() == [int(tokens[rows].sum()) for rows in packs.lists()]
    if max_encoded is None:
        assert tokens.sum() / (len(packs) * 2048) > 0.99
    else:
        assert packs.sums(encoded).max() <= max_encoded
        assert encoded.sum() / (len(packs) * max_encoded) > 0.7  # with three pictures of 256 it would be 0.85
    assert np.array_equal(make(sizes, 2048, max_encoded).rows_R, packs.rows_R)


def test_many_rows_of_one_length_take_no_longer_than_others():
    """Packs with equal room must not be searched one by one: with 400,000 of them that would take hours."""
    tokens = np.concatenate([np.full(100_000, 700), np.full(100_000, 300)])
    assert len(best_fit(RowSizes(tokens, np.zeros_like(tokens)), 1000)) == 100_000
    assert len(exact_fit(tokens, 1000)) == 100_000


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


def test_packs_of_a_step_stand_by_their_cost():
    costs, order = np.array([5.0, 1.0, 4.0, 2.0, 3.0]), np.array([0, 2, 1, 4, 3])
    assert by_cost_in_steps(costs, order, 3).tolist() == [1, 2, 0, 3, 4]
    assert by_cost_in_steps(costs, order, 1).tolist() == order.tolist()


def test_imbalance_by_hand():
    assert imbalance(np.array([1.0, 3.0, 2.0, 2.0, 9.0]), 2) == pytest.approx((3 + 2) / (2 + 2))


def test_lists_and_packs_are_the_same():
    packs = from_lists([[3, 1], [], [2]])
    assert lists(packs) == [[3, 1], [], [2]]
    assert packs.sums(np.array([0, 10, 20, 30])).tolist() == [40, 0, 20]
