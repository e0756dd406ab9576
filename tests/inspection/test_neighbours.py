"""Near pairs: exactly those of comparing all with each other."""

import numpy as np
import pytest
from numpy.typing import NDArray

from inspection import neighbours
from inspection.neighbours import near_pairs, popcount


def clustered(seed: int, num_clusters: int, most_flips: int) -> NDArray[np.uint64]:
    """Random hashes, each with a few others around it and a few that equal it."""
    generator = np.random.default_rng(seed)
    hashes = []
    for centre in generator.integers(0, 2**64, num_clusters, dtype=np.uint64).tolist():
        for _ in range(4):
            flips = generator.choice(64, generator.integers(0, most_flips + 1), replace=False).tolist()
            hashes.append(centre ^ sum(1 << bit for bit in flips))
    return generator.permutation(np.array(hashes, dtype=np.uint64))


def brute(hashes_N: NDArray[np.uint64], max_distance: int) -> list[tuple[int, int]]:
    values = hashes_N.tolist()
    num = len(values)
    return [(i, j) for i in range(num) for j in range(i + 1, num) if (values[i] ^ values[j]).bit_count() <= max_distance]


@pytest.mark.parametrize("max_distance", [0, 1, 2, 3, 5, 6, 9, 16])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_all_pairs_are_found_each_once(max_distance: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    hashes_N = clustered(max_distance, 60, max_distance + 3)
    found = [tuple(pair) for pairs_P2 in near_pairs(hashes_N, max_distance) for pair in pairs_P2.tolist()]
    expected = brute(hashes_N, max_distance)
    assert sorted(found) == expected
    assert len(expected) > 5


def test_few_hashes_are_no_special_case() -> None:
    assert list(near_pairs(np.array([], dtype=np.uint64), 6)) == []
    assert list(near_pairs(np.array([5], dtype=np.uint64), 6)) == []
    same = np.full(5, 2**64 - 1, dtype=np.uint64)
    assert sum(len(pairs_P2) for pairs_P2 in near_pairs(same, 6)) == 10


def test_bits_are_counted() -> None:
    values = [0, 1, 2**63, 2**64 - 1, *np.random.default_rng(0).integers(0, 2**64, 200, dtype=np.uint64).tolist()]
    assert popcount(np.array(values, dtype=np.uint64)).tolist() == [value.bit_count() for value in values]


def test_many_hashes_do_not_take_all_pairs() -> None:
    hashes_N = np.random.default_rng(4).integers(0, 2**64, 30_000, dtype=np.uint64)
    hashes_N[20_000:20_100] = hashes_N[:100] ^ np.uint64(0b10000100001)
    found = np.concatenate(list(near_pairs(hashes_N, 6)))
    assert {(i, i + 20_000) for i in range(100)} <= {tuple(pair) for pair in found.tolist()}


def test_a_distance_that_is_not_near_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 16, got 17"):
        list(near_pairs(np.zeros(2, dtype=np.uint64), 17))
