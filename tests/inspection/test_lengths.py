"""Quantiles and histograms of lengths, by hand."""

import numpy as np
import pytest

from inspection.lengths import composition, covering, histogram, share_above, summarise


def test_a_line_is_the_length_of_a_row_that_covers_its_share() -> None:
    lengths_N = np.arange(1, 201)
    assert [covering(lengths_N, share) for share in (0.5, 0.95, 0.99, 1.0)] == [100, 190, 198, 200]
    assert covering(np.array([7]), 0.99) == 7
    for share in (0.5, 0.95, 0.99):
        lengths_N = np.random.default_rng(1).integers(1, 5000, 777)
        line = covering(lengths_N, share)
        assert line in lengths_N
        assert share_above(lengths_N, line) <= 1 - share < share_above(lengths_N, line - 1)


def test_a_histogram_has_round_bins_and_loses_nothing() -> None:
    assert histogram(np.array([3, 3, 5])) == histogram(np.array([5, 3, 3]))
    bins = histogram(np.array([3, 3, 5]))
    assert (bins.start, bins.width, bins.counts) == (3, 1, (2, 0, 1))
    bins = histogram(np.array([12, 95, 99, 480]), most_bins=10)
    assert (bins.start, bins.width) == (0, 50)
    assert bins.counts == (1, 2, 0, 0, 0, 0, 0, 0, 0, 1)
    values_N = np.random.default_rng(0).integers(-90, 100_000, 5000)
    assert sum(histogram(values_N).counts) == 5000
    assert len(histogram(values_N).counts) <= 40


def test_bars_are_made_up_of_the_tokens_in_them() -> None:
    tokens_NK = np.array([[3, 1], [4, 0], [0, 8]])
    bins = histogram(tokens_NK.sum(axis=1))
    parts_EK = composition(tokens_NK, bins)
    assert parts_EK.sum(axis=1) == pytest.approx(bins.counts)
    assert parts_EK[0].tolist() == [1.75, 0.25]
    assert parts_EK[-1].tolist() == [0, 1]


def test_a_summary_is_of_rows() -> None:
    summary = summarise(np.array([10, 20, 30]))
    assert summary is not None
    assert (summary.num_rows, summary.total, summary.lines, summary.longest) == (3, 60, (20, 30, 30), 30)
    assert summarise(np.array([], dtype=np.int64)) is None
