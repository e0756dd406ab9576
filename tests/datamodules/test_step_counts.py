"""What an optimizer step counts is known before its first batch. K terms of a loss."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from datamodules.batch import Batch
from datamodules.step_counts import count_ahead

COUNTS = [3, 1, 4, 1, 5, 9, 2]


def source(taken: list[int]) -> Iterator[Batch]:
    for number, supervised in enumerate(COUNTS):
        taken.append(number)
        batch: Any = {"number": number, "num_supervised": supervised}
        yield cast("Batch", batch)


def counts(batch: Batch) -> torch.Tensor:
    return torch.tensor([1.0, batch["num_supervised"]])


@pytest.mark.parametrize(
    ("first", "step_size", "num_batches", "expected"),
    [
        (0, 1, 7, [3, 1, 4, 1, 5, 9, 2]),
        (0, 3, 7, [8, 8, 8, 15, 15, 15, 2]),
        (3, 3, 10, [8, 8, 8, 15, 15, 15, 2]),  # as after a resume, in the middle of an epoch
        (0, 3, 5, [8, 8, 8, 6, 6]),  # trainer.limit_train_batches: the last step has two
        (0, 4, torch.inf, [9, 9, 9, 9, 16, 16, 16]),
        (1, 4, 8, [8, 8, 8, 17, 17, 17, 17]),  # the rest of a step
    ],
)
def test_each_batch_tells_of_its_step(first: int, step_size: int, num_batches: float, expected: list[int]) -> None:
    batches = list(count_ahead(source([]), counts, first, step_size, num_batches))
    assert [cast("Any", batch)["number"] for batch in batches] == list(range(7))
    assert [batch["step_counts"][1].item() for batch in batches[: len(expected)]] == expected
    assert all(batch["step_counts"][0] <= step_size for batch in batches)


def test_no_more_is_read_than_a_step_needs() -> None:
    taken: list[int] = []
    batches = count_ahead(source(taken), counts, 0, 3, 7)
    for number in range(7):
        next(batches)
        assert taken == list(range(min(number + 3, 7)))
