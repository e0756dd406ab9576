"""Lengths of rows in tokens: quantiles, histograms, and what a limit costs.

Shape suffixes: N rows, K kinds of tokens, E bins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.batch import MODALITIES

KINDS = ("text", *MODALITIES)
"""What a token of a row stands for."""

QUANTILES = (0.5, 0.95, 0.99)
MOST_BINS = 40


@dataclass(frozen=True)
class Histogram:
    """Counts of whole numbers.

    Args:
        start: The first number of the first bin.
        width: Numbers in a bin.
        counts: Of each bin.
    """

    start: int
    width: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class LengthSummary:
    """Tokens of one kind, or of all, in the rows that have some.

    Args:
        num_rows: How many rows have some.
        total: All of them together.
        lines: The shortest length that covers 50, 95 and 99 % of these rows.
        longest: The longest.
        histogram: Rows by length.
    """

    num_rows: int
    total: int
    lines: tuple[int, ...]
    longest: int
    histogram: Histogram


def summarise(lengths_N: NDArray[np.int64]) -> LengthSummary | None:
    """The summary of lengths; None where there are none."""
    if not len(lengths_N):
        return None
    lines = tuple(covering(lengths_N, share) for share in QUANTILES)
    return LengthSummary(len(lengths_N), int(lengths_N.sum()), lines, int(lengths_N.max()), histogram(lengths_N))


def covering(lengths_N: NDArray[np.int64], share: float) -> int:
    """The shortest length that at least this share of the rows does not exceed; always the length of a row."""
    return int(np.quantile(lengths_N, share, method="inverted_cdf"))


def histogram(values_N: NDArray[np.int64], most_bins: int = MOST_BINS) -> Histogram:
    """Counts in bins of 1, 2, 5, 10, 20, … numbers, the fewest numbers with which there are not too many bins."""
    low, high = int(values_N.min()), int(values_N.max())
    widths = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < most_bins)
    start = low // width * width
    counts = np.bincount((values_N - start) // width)
    return Histogram(start, width, tuple(counts.tolist()))


def composition(tokens_NK: NDArray[np.int64], bins: Histogram) -> NDArray[np.float64]:
    """How the rows of each bin are made up: parts_EK, whose sum over the kinds is the count of the bin.

    Args:
        tokens_NK: Tokens of each kind in each row.
        bins: Histogram of their sums.
    """
    total_N = tokens_NK.sum(axis=1)
    parts_EK = np.zeros((len(bins.counts), tokens_NK.shape[1]))
    np.add.at(parts_EK, (total_N - bins.start) // bins.width, tokens_NK / np.maximum(total_N, 1)[:, None])
    return parts_EK


def share_above(lengths_N: NDArray[np.int64], max_length: int) -> float:
    """The share of the rows that are longer; 0 where there are none."""
    return float(np.mean(lengths_N > max_length)) if len(lengths_N) else 0.0
