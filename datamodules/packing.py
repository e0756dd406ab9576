"""Which rows share a place of a batch, so that little of it is padding: pure functions of the rows' sizes.

Shape suffixes: R rows, P packs, 2 tokens and encoder tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from datamodules.exact_fit import exact_fit

_TRIES = 16
"""Packs with room for a row's tokens that are asked whether they have room for its media, too."""


class RowSize(NamedTuple):
    """How much of a batch a row takes: `tokens` of the language model, and `encoded`, that go through encoders.

    Where it is padded, it takes so many rows of the batch (answers that are compared and share no prompt have one each), the
    longest of `longest` tokens.
    """

    tokens: int
    encoded: int
    num_rows: int
    longest: int


class RowSizes(NamedTuple):
    """The `RowSize` of each row; without the last two each takes one row of the batch. 0 tokens: the row cannot be used."""

    tokens_R: np.ndarray
    encoded_R: np.ndarray
    num_rows_R: np.ndarray | None = None
    longest_R: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "RowSizes":
        """The sizes of some rows."""
        others = (None if values is None else values[rows] for values in (self.num_rows_R, self.longest_R))
        return RowSizes(self.tokens_R[rows], self.encoded_R[rows], *others)

    def guessed(self) -> "RowSizes":
        """These sizes, and of rows that cannot be used that of the middle row: they may be usable when their turn comes."""
        is_known_R = self.tokens_R > 0
        if is_known_R.all() or not is_known_R.any():
            return self
        known = np.flatnonzero(is_known_R)
        middle = known[np.argsort(self.tokens_R[known], kind="stable")[len(known) // 2]]
        return self.take(np.where(is_known_R, np.arange(len(is_known_R)), middle))

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """`num_rows_R` and `longest_R`."""
        if self.num_rows_R is None or self.longest_R is None:
            return np.ones_like(self.tokens_R), self.tokens_R
        return self.num_rows_R, self.longest_R


class Packs(NamedTuple):
    """Rows in the order of their packs: pack p holds rows_R[ends_P[p - 1] : ends_P[p]]."""

    rows_R: np.ndarray
    ends_P: np.ndarray

    def __len__(self) -> int:
        return len(self.ends_P)

    def lists(self) -> list[np.ndarray]:
        """The rows of each pack."""
        return np.split(self.rows_R, self.ends_P[:-1]) if len(self) else []

    def sums(self, sizes_R: np.ndarray) -> np.ndarray:
        """What the rows of each pack add up to."""
        totals = np.concatenate([[0], np.cumsum(sizes_R[self.rows_R])])
        return np.diff(totals[np.concatenate([[0], self.ends_P])])


def from_lists(lists: Sequence[Sequence[int] | np.ndarray]) -> Packs:
    """Packs of lists of rows."""
    ends_P = np.cumsum([len(rows) for rows in lists], dtype=np.int64)
    return Packs(np.concatenate([np.asarray(rows, np.int64) for rows in lists]) if lists else np.empty(0, np.int64), ends_P)


def pack(sizes: RowSizes, max_tokens: int, max_encoded: int | None = None) -> Packs:
    """Packs rows so that few packs are needed: by `exact_fit`, or by `best_fit` where that needs fewer.

    Packs of `exact_fit` that hold too much for the encoders are packed again.

    Args:
        sizes: Of each row.
        max_tokens: Tokens that a pack holds; a row that is longer gets one of its own.
        max_encoded: Tokens of encoders that a pack holds; None: any number.
    """
    packs = from_lists(exact_fit(sizes.tokens_R, max_tokens))
    if max_encoded is not None:
        is_over_P = packs.sums(sizes.encoded_R) > max_encoded
        lists = packs.lists()
        again_R = np.sort(np.concatenate([[], *(lists[place] for place in np.flatnonzero(is_over_P))]).astype(np.int64))
        others = best_fit(sizes.take(again_R), max_tokens, max_encoded).lists()
        packs = from_lists([lists[place] for place in np.flatnonzero(~is_over_P)] + [again_R[rows] for rows in others])
    if len(packs) <= fewest_packs(sizes.tokens_R, max_tokens):
        return packs
    return min(packs, best_fit(sizes, max_tokens, max_encoded), key=len)


def fewest_packs(tokens_R: np.ndarray, max_tokens: int) -> int:
    """A number of packs below which nobody gets (the bound L2 of Martello & Toth 1990, Knapsack Problems, section 8.3).

    Rows above half of a pack need one each. For any k, rows from k to one half go only into what those of them leave that have
    at most max_tokens - k, or into further packs. With k = 0 that is the sum of all tokens.

    Args:
        tokens_R: Tokens of each row.
        max_tokens: Tokens that a pack holds; a row that is longer gets one of its own.
    """
    counts_L = np.bincount(tokens_R[tokens_R <= max_tokens], minlength=max_tokens + 2)
    rows_L = np.cumsum(counts_L[::-1])[::-1]  # with at least so many tokens
    sums_L = np.cumsum((counts_L * np.arange(max_tokens + 2))[::-1])[::-1]  # and their tokens
    half, k = max_tokens // 2 + 1, np.arange(max_tokens // 2 + 1)
    above = max_tokens - k + 1
    left = (rows_L[half] - rows_L[above]) * max_tokens - (sums_L[half] - sums_L[above])
    further = -((left - (sums_L[k] - sums_L[half])) // max_tokens)
    return int(rows_L[half] + max(0, further.max()) + (tokens_R > max_tokens).sum())


def best_fit(sizes: RowSizes, max_tokens: int, max_encoded: int | None = None) -> Packs:
    """Packs rows so that few packs are needed: best fit decreasing (Johnson 1974, within 11/9 of the fewest).

    The longest row comes first, and each goes into the fullest pack that has room for it. A row that is longer than a pack gets
    one of its own. Rows of one length are taken in their order.

    Args:
        sizes: Of each row.
        max_tokens: Tokens that a pack holds.
        max_encoded: Tokens of encoders that a pack holds; None: any number.
    """
    order_R = np.argsort(-sizes.tokens_R, kind="stable")
    tokens, encoded = sizes.tokens_R.tolist(), sizes.encoded_R.tolist()
    limit = sum(encoded) if max_encoded is None else max_encoded
    least = min((size for size in encoded if size), default=0)
    packs: list[list[int]] = []
    media_rooms: list[int] = []  # encoder tokens that a pack still has room for
    takes_media, takes_text = _Rooms(max_tokens), _Rooms(max_tokens)
    for row in order_R.tolist():
        size, media = tokens[row], encoded[row]
        found = None
        for rooms in (takes_media,) if media else (takes_text, takes_media):
            if found is None and size <= max_tokens:
                found = rooms.take(size, media, media_rooms)
        if found is None:
            packs.append([row])
            media_rooms.append(limit - media)
            pack, room = len(packs) - 1, max(max_tokens, size)
        else:
            pack, room = found
            packs[pack].append(row)
            media_rooms[pack] -= media
        (takes_media if media_rooms[pack] >= least else takes_text).put(pack, room - size)
    return from_lists(packs)


class _Rooms:
    """Packs by the tokens that they have room for."""

    def __init__(self, max_tokens: int) -> None:
        self._packs: list[list[int]] = [[] for _ in range(max_tokens + 1)]
        self._occupied = 0  # bit i: there are packs with room for i tokens

    def put(self, pack: int, room: int) -> None:
        self._packs[room].append(pack)
        self._occupied |= 1 << room

    def take(self, size: int, media: int, media_rooms: Sequence[int]) -> tuple[int, int] | None:
        """Takes out the fullest pack with room for a row: the pack, and its room; of packs with room for its tokens a few are
        asked whether they have room for its media."""
        tries, above, offset = _TRIES, self._occupied >> size, size
        while above and tries:
            room = offset + (above & -above).bit_length() - 1
            packs = self._packs[room]
            for place in range(-1, -min(tries, len(packs)) - 1, -1):
                if media_rooms[packs[place]] >= media:
                    pack = packs.pop(place)
                    if not packs:
                        self._occupied &= ~(1 << room)
                    return pack, room
            tries -= min(tries, len(packs))
            above, offset = self._occupied >> (room + 1), room + 1
        return None


def similar_lengths(sizes: RowSizes, max_tokens: int, max_encoded: int | None = None) -> Packs:
    """Groups rows of like length, for batches that are padded: the longest row of a batch times its rows is at most `max_tokens`.

    Args:
        sizes: Of each row.
        max_tokens: Tokens of a group, its padding included.
        max_encoded: Tokens of encoders in a group; None: any number.
    """
    num_rows_R, longest_R = sizes.padded()
    order_R = np.argsort(longest_R, kind="stable")
    groups: list[list[int]] = [[]]
    height, encoded_sum = 0, 0
    for row in order_R.tolist():
        own, longest, encoded = int(num_rows_R[row]), int(longest_R[row]), int(sizes.encoded_R[row])  # the longest so far
        is_full = longest * (height + own) > max_tokens or (max_encoded is not None and encoded_sum + encoded > max_encoded)
        if groups[-1] and is_full:
            groups.append([])
            height, encoded_sum = 0, 0
        groups[-1].append(row)
        height += own
        encoded_sum += encoded
    return from_lists([group for group in groups if group])


def halve(lists: Sequence[np.ndarray], num_packs: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Halves packs, drawn at random, until there are so many, or each holds one row.

    Args:
        lists: The rows of each pack.
        num_packs: Packs that are wanted.
        generator: Draws them.
    """
    lists = list(lists)
    while len(lists) < num_packs and (several := [place for place, rows in enumerate(lists) if len(rows) > 1]):
        for place in generator.permutation(several)[: num_packs - len(lists)].tolist():
            rows = lists[place]
            lists[place] = rows[::2]
            lists.append(rows[1::2])
    return lists


def by_cost_in_steps(costs_P: np.ndarray, order_P: np.ndarray, step_size: int) -> np.ndarray:
    """An order of packs, and within each step of it the packs by their cost.

    The processes that compute at one time wait for the slowest of them: what they get at one time should cost the same. Which
    packs a step has does not change.

    Args:
        costs_P: Of each pack.
        order_P: The packs, in their order.
        step_size: Packs of a step, on all processes together.
    """
    return order_P[np.lexsort((costs_P[order_P], np.arange(len(order_P)) // step_size))]


def balance(costs_P: np.ndarray, group_size: int, generator: np.random.Generator) -> np.ndarray:
    """An order of packs in which each stretch of `group_size` holds packs of like cost, the stretches in random order.

    So packs that are alike come together, and the stretches differ more than those of a random order.

    Args:
        costs_P: Of each pack.
        group_size: Packs of a step, on all processes together.
        generator: Draws the order of the stretches; a smaller one at the end stays there.
    """
    by_cost_P = np.argsort(costs_P, kind="stable")
    whole = len(costs_P) // group_size
    # the few that are left over are taken at random, and not the dearest
    left_over = np.sort(generator.choice(len(costs_P), len(costs_P) - whole * group_size, replace=False))
    kept_P = np.delete(by_cost_P, left_over)
    groups = kept_P.reshape(whole, group_size)[generator.permutation(whole)]
    return np.concatenate([groups.ravel(), by_cost_P[left_over]])


def imbalance(costs_P: np.ndarray, group_size: int) -> float:
    """How much longer the steps take than if all processes had the same to do: the mean of max / mean over steps, weighted."""
    whole = costs_P[: len(costs_P) // group_size * group_size].reshape(-1, group_size)
    return float(whole.max(1).sum() / whole.mean(1).sum())
