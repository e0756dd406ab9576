"""Means of an evaluation, by hand; those of several processes are in test_multimodal_ddp.py."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_modules.epoch_means import EpochMeans

ONE_PROCESS: Any = SimpleNamespace(world_size=1)


def test_means_are_totals_by_counts_over_all_rows_and_by_source() -> None:
    means = EpochMeans()
    means.add({"loss": (torch.tensor([6.0, 1.0, 2.0]), torch.tensor([3, 1, 1]))}, ["web", "birds", "web"])
    means.add({"loss": (torch.tensor([5.0]), torch.tensor([2])), "right": (torch.tensor([True]), torch.tensor([1]))}, ["birds"])
    expected = {"loss": 14 / 7, "right": 1.0, "web/loss": 8 / 4, "birds/loss": 6 / 3, "birds/right": 1.0}
    assert means.compute(ONE_PROCESS) == expected
    means.reset()
    assert means.compute(ONE_PROCESS) == {}


@pytest.mark.parametrize("source", ["", "web"])
def test_one_source_alone_is_not_told_twice(source: str) -> None:
    means = EpochMeans()
    means.add({"loss": (torch.tensor([6.0, 2.0]), torch.tensor([3, 1]))}, [source, source])
    assert means.compute(ONE_PROCESS) == {"loss": 2.0}


def test_what_no_row_counts_for_has_no_mean() -> None:
    means = EpochMeans()
    nothing = torch.zeros(2)
    means.add({"accuracy": (nothing, nothing), "loss": (torch.tensor([1.0, math.nan]), torch.ones(2))}, ["web", "birds"])
    got = means.compute(ONE_PROCESS)
    assert got["web/loss"] == 1.0 and math.isnan(got["birds/loss"]) and math.isnan(got["loss"])
    assert not any("accuracy" in name for name in got)


def test_many_rows_are_added_up_exactly() -> None:
    """In single precision the sum of so many would stop to grow."""
    means = EpochMeans()
    for value in (2.0**24, 1.0, 1.0, 1.0, 1.0):
        means.add({"loss": (torch.tensor([value]), torch.tensor([1]))}, [""])
    assert means.compute(ONE_PROCESS)["loss"] == (2**24 + 4) / 5
