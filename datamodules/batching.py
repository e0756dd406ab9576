"""How rows become batches: so many rows, as many of like length as fit, or packs."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.packing import Packs, RowSizes, balance, by_cost_in_steps, from_lists, halve, pack, similar_lengths

_TRIES = 4
"""Orders in which rows are put together anew where they needed too many packs."""


@dataclass(frozen=True)
class Batching:
    """How training rows become batches.

    Args:
        kind: `rows`: `data.batch_size` rows, padded to the longest. `padded`: rows of like length, as many as fit `max_tokens`
            with their padding, whatever `data.batch_size`. `packed`: `data.batch_size` packs of up to `max_tokens`, each of
            several rows, which do not see each other: their losses and gradients are those that they have alone.
        max_tokens: Tokens of a pack, or of a padded batch. A longer row stands alone. Lengths are those without augmentation: a
            crop may leave a ready model fewer tokens. A model whose language model cannot let compared answers share a prompt
            reads each behind a copy of it, which is not counted.
        max_encoded: Most tokens of encoders (patches, frames of sound) in a pack or padded batch; None: any number.
        window: So many rows, drawn in the order of the epoch, are packed or grouped together. More leave less padding, fewer
            mix better.
        like_cost: Take packs of like cost into each optimizer step, for processes that have one pack in it and would wait for the
            dearest. Steps differ more then: long texts come together, and so do pictures. False: the packs of a step are drawn at
            random, and it computes those of like cost at one time, which serves where each process has several.
    """

    kind: Literal["rows", "padded", "packed"] = "rows"
    max_tokens: int = 4096
    max_encoded: int | None = None
    window: int = 16_384
    like_cost: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("window", 1), ("max_encoded", 1)):
            value = vars(self)[name]
            if value is not None and value < least:
                raise ValueError(f"data.batching.{name} must be at least {least}, got {value}")

    def packs(self, sizes: RowSizes, most: int | None = None) -> Packs:
        """The packs or groups of rows that stand in an order.

        Args:
            sizes: Of each row, in the order of the epoch.
            most: So many are wanted at most: where there are more, the rows are put together anew, and not by windows. There may
                be more in the end, if the rows do not fit; None: any number.
        """
        assert self.kind != "rows", "each row is a unit of its own"
        num_rows, sizes = len(sizes.tokens_R), sizes.guessed()
        packs = self._in_windows(sizes, np.arange(num_rows), self.window)
        for seed in range(_TRIES):
            if most is None or len(packs) <= most:
                break
            again = self._in_windows(sizes, np.random.default_rng(seed).permutation(num_rows), num_rows)
            packs = min(packs, again, key=len)
        return packs

    def _in_windows(self, sizes: RowSizes, order_R: np.ndarray, window: int) -> Packs:
        make = pack if self.kind == "packed" else similar_lengths
        lists: list[np.ndarray] = []
        for start in range(0, len(order_R), window):
            rows = order_R[start : start + window]
            lists += [rows[unit] for unit in make(sizes.take(rows), self.max_tokens, self.max_encoded).lists()]
        return from_lists(lists)

    def units(self, packs: Packs, sizes: RowSizes, num_units: int, step_size: int, seed: int) -> Packs:
        """Packs in the order in which batches take them, some of them halved so that there are as many as in any epoch.

        A pure function: the same on all processes, and for every number of them with the same `step_size`.

        Args:
            packs: Of an epoch.
            sizes: Of each row, in the order of the epoch.
            num_units: Packs of each epoch.
            step_size: Packs of an optimizer step, on all processes together.
            seed: Draws the order, and which packs are halved.
        """
        generator = np.random.default_rng(seed)
        lists = halve(packs.lists(), num_units, generator)
        costs = pack_costs(from_lists(lists), sizes)
        order = balance(costs, step_size, generator) if self.like_cost else generator.permutation(len(lists))
        return from_lists([lists[unit] for unit in by_cost_in_steps(costs, order, step_size).tolist()])

    def shares(self, sizes: RowSizes) -> np.ndarray:
        """The share of a unit that each row takes at least, whatever it is put together with."""
        sizes = sizes.guessed()
        num_rows_R, longest_R = sizes.padded()
        tokens_R = num_rows_R * longest_R if self.kind == "padded" else sizes.tokens_R
        shares_R = np.maximum(tokens_R, 1) / self.max_tokens
        if self.max_encoded is not None:
            shares_R = np.maximum(shares_R, sizes.encoded_R / self.max_encoded)
        return np.minimum(shares_R, 1.0)


def pack_costs(packs: Packs, sizes: RowSizes) -> np.ndarray:
    """What a pack costs about, in matrix products of a token: attention grows with the square of a row's own length."""
    squares_R = sizes.tokens_R.astype(np.float64) ** 2 / 4096
    return packs.sums(sizes.tokens_R + squares_R + sizes.encoded_R)
