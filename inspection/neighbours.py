"""Near pairs among many hashes, found without comparing all of them with each other.

Shape suffixes: N hashes, P pairs.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BITS = 64
CHUNK = 1 << 20
"""Pairs that are looked at together, which bounds the memory."""

MOST_DISTANCE = 16
"""Two random hashes differ in 32 bits; far below that "near" has a meaning, and bands are wide enough to be a search."""


def near_pairs(hashes_N: NDArray[np.uint64], max_distance: int) -> Iterator[NDArray[np.int64]]:
    """All pairs of hashes that differ in at most `max_distance` bits, each once, in pieces.

    Of `max_distance // 2 + 1` bands of bits at least one differs in one bit or none ("multi-index hashing", Norouzi et al.
    2012, eq. 3), so only hashes that share a band, or nearly share it, are compared. 1,000,000 hashes at a distance of 6 are
    about 500 million comparisons instead of 500 billion.

    Args:
        hashes_N: 64 bits each.
        max_distance: Hamming distance, from 0 to 16.

    Yields:
        pairs_P2: Numbers of the hashes, the lower one first.

    Raises:
        ValueError: The distance is out of its range.
    """
    if not 0 <= max_distance <= MOST_DISTANCE:
        raise ValueError(f"a Hamming distance is searched from 0 to {MOST_DISTANCE}, got {max_distance}")
    bands = _bands(max_distance // 2 + 1)
    for number, (shift, width) in enumerate(bands):
        values_N = (hashes_N >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        order_N = np.argsort(values_N, kind="stable")
        flips = (0, *(1 << bit for bit in range(width))) if max_distance > 0 else (0,)
        for flip in flips:
            for left_P, right_P in _joined(values_N[order_N], flip):
                pairs_P2 = np.sort(np.stack([order_N[left_P], order_N[right_P]], axis=1), axis=1)
                differing_P = hashes_N[pairs_P2[:, 0]] ^ hashes_N[pairs_P2[:, 1]]
                found_P = popcount(differing_P) <= max_distance
                for other_shift, other_width in bands[:number]:  # found there already
                    mask = np.uint64(((1 << other_width) - 1) << other_shift)
                    found_P &= popcount(differing_P & mask) > min(max_distance, 1)
                if found_P.any():
                    yield pairs_P2[found_P]


def popcount(values_N: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Number of bits that are set in each value (Warren, Hacker's Delight, fig. 5-2)."""
    ones, twos, fours = (np.uint64(int(digits * 8, 16)) for digits in ("55", "33", "0f"))
    values_N = values_N - ((values_N >> np.uint64(1)) & ones)
    values_N = (values_N & twos) + ((values_N >> np.uint64(2)) & twos)
    values_N = (values_N + (values_N >> np.uint64(4))) & fours
    return ((values_N * np.uint64(int("01" * 8, 16))) >> np.uint64(56)).astype(np.uint8)


def _bands(num_bands: int) -> list[tuple[int, int]]:
    """Shift and width of each band; together they are all bits."""
    edges = [BITS * number // num_bands for number in range(num_bands + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


def _joined(sorted_N: NDArray[np.uint64], flip: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places of the values that are equal but for the bit `flip` (0: equal), each pair once, in pieces."""
    wanted_N = sorted_N ^ np.uint64(flip)
    first_N = np.searchsorted(sorted_N, wanted_N, "left")
    last_N = np.searchsorted(sorted_N, wanted_N, "right")
    if flip:
        last_N = np.where(wanted_N > sorted_N, last_N, first_N)
    else:
        first_N = np.arange(1, len(sorted_N) + 1)
    counts_N = last_N - first_N
    ends_N = np.cumsum(counts_N)
    start = 0
    while start < len(sorted_N):
        done = int(ends_N[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends_N, done + CHUNK, "right")))
        counts = counts_N[start:stop]
        if total := int(counts.sum()):
            offsets = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
            yield np.repeat(np.arange(start, stop), counts), np.repeat(first_N[start:stop], counts) + offsets
        start = stop
