import random
from collections.abc import Iterable

import pytest

from datamodules import split


def hold_out(sources: Iterable[Iterable[str]], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Of one file."""
    (found,) = split.hold_out([sources], [share], seed)
    return found


def connected(sources: list[list[str]]) -> list[set[int]]:
    """The groups of rows, by spreading from row to row."""
    groups, left = [], set(range(len(sources)))
    while left:
        group, new = set(), {min(left)}
        while new:
            group |= new
            seen = {name for row in new for name in sources[row]}
            new = {row for row in left - group if seen & set(sources[row])}
        groups.append(group)
        left -= group
    return groups


def make_sources(rng: random.Random, num_rows: int, num_names: int) -> list[list[str]]:
    return [[f"{rng.randrange(num_names)}.png" for _ in range(rng.choice([0, 1, 1, 1, 2]))] for _ in range(num_rows)]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.7])
def test_groups_stay_whole_and_the_share_is_met(share: float) -> None:
    rng = random.Random(7)
    for num_names in (150, 400, 2000):
        sources = make_sources(rng, 300, num_names)
        rest, held_out = hold_out(iter(sources), share, 5)
        assert rest == sorted(rest) and held_out == sorted(held_out) and sorted(rest + held_out) == list(range(300))
        groups = connected(sources)
        assert all(group <= set(rest) or group <= set(held_out) for group in groups)
        assert rest and held_out
        assert max(map(len, groups)) > 1
        if num_names > 150:  # few names make one group of half the rows
            assert abs(len(held_out) - share * 300) <= 2


def test_the_draw_is_seeded_and_does_not_depend_on_the_names() -> None:
    sources = make_sources(random.Random(3), 60, 200)
    other_names: list[Iterable[str]] = [[f"data:image/png;base64,{name}" for name in reversed(names)] for names in sources]
    assert hold_out(sources, 0.2, 5) == hold_out(sources, 0.2, 5) == hold_out(other_names, 0.2, 5)
    assert len({tuple(hold_out(sources, 0.2, seed)[1]) for seed in range(8)}) == 8


def test_rows_without_media_stand_alone() -> None:
    drawn = {row for seed in range(40) for row in hold_out([[]] * 5, 0.01, seed)[1]}
    assert drawn == {0, 1, 2, 3, 4}


def test_no_side_is_empty_where_there_are_two_groups() -> None:
    two = [["a"], ["a", "b"], ["c"], ["b"], ["d"], ["c", "d"], ["b"]]
    for seed in range(8):
        assert hold_out(two, 0.1, seed) == ([0, 1, 3, 6], [2, 4, 5])
        assert set(map(len, hold_out(two, 0.99, seed))) == {3, 4}
    assert hold_out([["a", "b"], ["b"], ["a"]], 0.3, 0) == ([], [0, 1, 2])


def test_rows_of_several_files_that_share_a_medium_stay_on_one_side() -> None:
    rng = random.Random(11)
    files = [make_sources(rng, num_rows, 400) for num_rows in (150, 80, 40)]
    shares = [0.1, 0.3, 0.5]
    for seed in range(5):
        splits = split.hold_out(files, shares, seed)
        sides: list[set[str]] = [set(), set()]
        for rows, share, parts in zip(files, shares, splits, strict=True):
            assert sorted(parts[0] + parts[1]) == list(range(len(rows))) and all(part == sorted(part) for part in parts)
            assert abs(len(parts[1]) - share * len(rows)) <= 3
            for side, part in zip(sides, parts, strict=True):
                side |= {name for row in part for name in rows[row]}
        assert not sides[0] & sides[1] and all(sides)


def test_each_file_holds_something_out_even_if_others_must_hold_out_more() -> None:
    big, small = [["a"]] * 20 + [[f"{number}"] for number in range(20)], [["a"], ["a"]]
    (rest, held_out), parts = split.hold_out([big, small], [0.1, 0.5], 0)
    assert parts == ([], [0, 1])  # all of them belong together, so nothing is left to train on: the caller says so
    assert set(range(20)) <= set(held_out) and rest
