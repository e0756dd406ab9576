"""Packs that are full to the last token: a pure function of the lengths of rows.

Shape suffixes: R rows.
"""

from collections.abc import Sequence

import numpy as np

_TRIES = 50
"""Rows that are looked at, in their order, for one that may follow in a pack; then the longest that fits does."""


def exact_fit(tokens_R: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Packs rows so that nearly every pack is full to its last token, as long as rows of many lengths are left.

    Rows come in a random order, those above half of a pack first. One opens a pack, and others follow it until one row, or two
    of about the same length, are left that fill it exactly. The order keeps the lengths that are left mixed to the end; taken
    by length, as in best fit, the last of them would fit nowhere.

    Args:
        tokens_R: Tokens of each row.
        max_tokens: Tokens that a pack holds; a row that is longer gets one of its own.
    """
    order_R = np.random.default_rng(0).permutation(len(tokens_R))
    order_R = order_R[np.argsort(tokens_R[order_R] <= max_tokens / 2, kind="stable")]
    is_longer_R = tokens_R[order_R] > max_tokens
    packs = [[row] for row in order_R[is_longer_R].tolist()]
    order, tokens = order_R[~is_longer_R].tolist(), tokens_R.tolist()
    left, is_packed = _Lengths(order, tokens, max_tokens), bytearray(len(tokens))
    for start, first in enumerate(order):
        if is_packed[first]:
            continue
        pack, room, place, lengths = list[int](), max_tokens, start, [tokens[first]]
        while lengths:
            for length in lengths:  # the first row of a length in the order is the one that is meant
                row = left.take(length)
                is_packed[row] = 1
                pack.append(row)
                room -= length
            lengths = left.filling(room) if room else []
            if room and not lengths and left.shortest <= room:
                most, stop = room - 2 * left.shortest, min(place + _TRIES, len(order))
                nearest = (at for at in range(place + 1, stop) if not is_packed[order[at]] and tokens[order[at]] <= most)
                place = next(nearest, stop)
                lengths = [tokens[order[place]] if place < stop else left.longest(room)]
        packs.append(pack)
    return packs


class _Lengths:
    """The lengths of the rows that are left.

    Bit i of `_there` says that there are rows of i tokens; `_mirrored` is the same number, read from its other end.
    """

    def __init__(self, order: Sequence[int], tokens: Sequence[int], max_tokens: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(max_tokens + 1)]
        for row in reversed(order):
            self._rows[tokens[row]].append(row)
        self._max_tokens = max_tokens
        self._there = sum(1 << length for length, rows in enumerate(self._rows) if rows)
        self._mirrored = sum(1 << (max_tokens - length) for length, rows in enumerate(self._rows) if rows)

    @property
    def shortest(self) -> int:
        """The least length; more than any pack holds where no row is left."""
        return (self._there & -self._there).bit_length() - 1 if self._there else self._max_tokens + 1

    def longest(self, room: int) -> int:
        """The greatest length that fits; there is one."""
        return (self._there & ((2 << room) - 1)).bit_length() - 1

    def take(self, length: int) -> int:
        """Takes out the first row of a length."""
        rows = self._rows[length]
        row = rows.pop()
        if not rows:
            self._there ^= 1 << length
            self._mirrored ^= 1 << (self._max_tokens - length)
        return row

    def filling(self, room: int) -> list[int]:
        """One length, or two as near to each other as there are, that make up `room`; empty: there are none."""
        if self._there >> room & 1:
            return [room]
        shorter = self._there & (self._mirrored >> (self._max_tokens - room)) & ((2 << room // 2) - 1)
        half = room // 2
        if 2 * half == room and shorter >> half & 1 and len(self._rows[half]) == 1:
            shorter ^= 1 << half
        low = shorter.bit_length() - 1
        return [room - low, low] if shorter else []
