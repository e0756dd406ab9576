"""What an optimizer step counts, known before its first batch is run.

A step's loss may have terms that count different things: a mean over pairs, beside a mean over tokens. Each term of a batch then
needs its own share in the gradients of the step, and that is a matter of the batches that are still to come.

Shape suffixes: K terms of a loss.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

import torch
from torch import Tensor

from datamodules.batch import Batch

Counts = Callable[[Batch], Tensor]
"""What the terms of a batch's loss count: counts_K."""


def count_ahead(batches: Iterable[Batch], counts: Counts, first: int, step_size: int, num_batches: float) -> Iterator[Batch]:
    """Adds `step_counts` to each batch: the sum of the counts of all batches of its step, on this process.

    So `step_size` batches are read before the first is handed out, and as many are kept; from then on each waits for one.

    Args:
        batches: The rest of an epoch.
        counts: Counts a batch.
        first: The number of the first of them in its epoch; a step begins at each multiple of `step_size`.
        step_size: Batches of a step.
        num_batches: Batches that a trainer takes of the epoch: the last step ends there.
    """
    source = iter(batches)
    waiting: deque[tuple[Batch, Tensor]] = deque()
    step_counts = torch.zeros(1)
    for number in count(first):
        waiting.extend((batch, counts(batch)) for batch in islice(source, step_size - len(waiting)))
        if not waiting:
            return
        if number == first or number % step_size == 0:
            rest = max(0, min(step_size - number % step_size, num_batches - number))
            step_counts = sum((counted for _, counted in islice(waiting, int(rest))), torch.zeros(1))
        batch, _ = waiting.popleft()
        batch["step_counts"] = step_counts
        yield batch
