"""How rows become batches: so many rows, as many of like length as fit, or packs."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.packing import Packs, RowSizes, balance, from_lists, pack, similar_lengths


@dataclass(frozen=True)
class Batching:
    """How training rows become batches.

    Args:
        kind: `rows`: `data.batch_size` rows, padded to the longest. `padded`: rows of like length, as many as fit `max_tokens`
            with their padding, whatever `data.batch_size`. `packed`: `data.batch_size` packs of up to `max_tokens`, each of
            several rows, which do not see each other: their losses and gradients are those that they have alone.
        max_tokens: Tokens of a pack, or of a padded batch. A longer row stands alone.
        max_encoded: Most tokens of encoders (patches, frames of sound) in a pack or padded batch; None: any number.
        window: So many rows, drawn in the order of the epoch, are packed or grouped together. More leave less padding, fewer
            mix better.
    """

    kind: Literal["rows", "padded", "packed"] = "rows"
    max_tokens: int = 4096
    max_encoded: int | None = None
    window: int = 16_384

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("window", 1), ("max_encoded", 1)):
            value = vars(self)[name]
            if value is not None and value < least:
                raise ValueError(f"data.batching.{name} must be at least {least}, got {value}")

    def units(self, sizes: RowSizes, group_size: int, seed: int) -> Packs:
        """The packs or groups of rows that stand in an order, and the order in which batches take them.

        A pure function: the same on all processes, and for every number of them with the same `group_size`.

        Args:
            sizes: Of each row, in the order of the epoch.
            group_size: Units of a batch, on all processes together: they cost about the same.
            seed: Draws the order of the batches.
        """
        assert self.kind != "rows", "each row is a unit of its own"
        make = pack if self.kind == "packed" else similar_lengths
        lists: list[np.ndarray] = []
        for start in range(0, len(sizes.tokens_R), self.window):
            rows = np.arange(start, min(start + self.window, len(sizes.tokens_R)))
            lists += [rows[unit] for unit in make(sizes.take(rows), self.max_tokens, self.max_encoded).lists()]
        order = balance(pack_costs(from_lists(lists), sizes), group_size, np.random.default_rng(seed))
        return from_lists([lists[unit] for unit in order.tolist()])


def pack_costs(packs: Packs, sizes: RowSizes) -> np.ndarray:
    """What a pack costs about, in matrix products of a token: attention grows with the square of a row's own length."""
    squares_R = sizes.tokens_R.astype(np.float64) ** 2 / 4096
    return packs.sums(sizes.tokens_R + squares_R + sizes.encoded_R)
