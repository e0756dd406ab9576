"""What each epoch takes of a source."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Portion:
    """What each epoch takes of a source: the next stretch of its endless sequence of passes.

    A pass has each row once. So no row comes a third time before each has come twice, whatever the weight, and each epoch
    takes as many rows as the one before.

    Args:
        num_rows: Rows of the source.
        weight: Passes an epoch; the rows of an epoch are rounded to a whole number, at least 1.
        seed: Seed of the order of the passes that epochs begin or end in the middle of.
    """

    num_rows: int
    weight: float = 1.0
    seed: int = 0

    @property
    def num_rows_an_epoch(self) -> int:
        """Rows that each epoch takes."""
        return max(1, math.floor(self.weight * self.num_rows + 0.5))

    def rows(self, epoch: int, shuffle: bool) -> Tensor:
        """Rows and passes keys_R2 of an epoch, not yet mixed.

        Args:
            epoch: Counted from 0.
            shuffle: Draw which rows come first in a pass; False: those that do in the file.
        """
        first, end = epoch * self.num_rows_an_epoch, (epoch + 1) * self.num_rows_an_epoch
        stretches = []
        for number in range(first // self.num_rows, -(-end // self.num_rows)):
            begin = number * self.num_rows
            places = slice(max(first - begin, 0), min(end - begin, self.num_rows))
            is_whole = places == slice(0, self.num_rows)
            rows_R = self._order(number) if shuffle and not is_whole else torch.arange(self.num_rows)
            stretches.append(torch.stack([rows_R[places], torch.full_like(rows_R[places], number)], dim=1))
        return torch.cat(stretches)

    def expected(self, values_R: np.ndarray, shuffle: bool) -> tuple[float, float]:
        """What values of its rows add up to in an epoch: mean and variance; in the order of the file the most instead, and 0.

        Args:
            values_R: Of the rows of the source.
            shuffle: As in `rows`.
        """
        num_drawn, whole = self.num_rows_an_epoch % self.num_rows, self.num_rows_an_epoch // self.num_rows
        if num_drawn == 0:
            return whole * float(values_R.sum()), 0.0
        if not shuffle:
            sums = np.concatenate([[0.0], np.cumsum(np.concatenate([values_R, values_R[:num_drawn]]))])
            return whole * float(values_R.sum()) + float((sums[num_drawn:] - sums[:-num_drawn]).max()), 0.0
        # rows drawn without replacement (Cochran 1977, Sampling Techniques, theorem 2.2)
        parts: list[tuple[float, ...]] = [(num_drawn,)]
        if math.gcd(num_drawn, self.num_rows) != num_drawn:  # an epoch may end one pass and begin another
            parts += [(num_drawn / 2,) * 2] + ([((self.num_rows + num_drawn) / 2,) * 2] if whole else [])
        most = max(sum(num * (1 - num / self.num_rows) for num in each) for each in parts)
        return self.num_rows_an_epoch * float(values_R.mean()), most * float(values_R.var(ddof=1))

    def _order(self, number: int) -> Tensor:
        return torch.randperm(self.num_rows, generator=generator(self.seed, number))


def generator(seed: int, number: int) -> torch.Generator:
    """A generator of its own for one of many orders."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
