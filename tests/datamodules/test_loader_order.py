"""An optimizer step has the same rows whatever processes, workers and micro-batches they come in, and goes on under others."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from datamodules.batch import Batch
from datamodules.batching import Batching
from datamodules.loader import StatefulLoader
from datamodules.mixture import MixtureDataModule
from datamodules.processor import Processor
from datamodules.skipped import SkippedRows
from datamodules.source import Source
from tests.datamodules.loader_fakes import make_row

STEP = 24
"""Units of an optimizer step, which each of the combinations divides."""
NUM_STEPS = 12
"""More than an epoch has."""
BATCHINGS = {
    "rows": Batching(),
    "packed": Batching("packed", max_tokens=150),
    "padded": Batching("padded", max_tokens=150),
}


class Combination(NamedTuple):
    """Processes, micro-batches of an optimizer step, and workers of each process."""

    world_size: int
    accumulate: int
    num_workers: int


ALL = [Combination(*numbers) for numbers in [(w, a, n) for w in (1, 2, 3, 4) for a in (1, 2) for n in (0, 1, 2)]]
WITHOUT_WORKERS = [combination for combination in ALL if combination.num_workers == 0]
MakeRanks = Callable[[str, Combination], list[StatefulLoader]]


@pytest.fixture
def make_ranks(tmp_path: Path, row_processor: Processor) -> MakeRanks:
    """`make_ranks(kind, combination)`: the loaders of all processes over a mixture of two files with answers of many lengths."""
    for name, num_rows in (("a", 130), ("b", 81)):
        rows = [make_row(number, answer=" ".join(["word"] * (1 + 7 * number % 11))) for number in range(num_rows)]
        lines = [json.dumps(row | {"id": f"{name}{number}"}) + "\n" for number, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    weights = {"a": 1.0, "b": 1.5}
    sources = {name: Source(train_path=str(tmp_path / f"{name}.jsonl"), weight=weight) for name, weight in weights.items()}
    dataset = MixtureDataModule(sources, processor=row_processor, num_workers=0).dataset("train")

    def make(kind: str, combination: Combination) -> list[StatefulLoader]:
        world_size, accumulate, num_workers = combination
        batch_size = 1 if kind == "padded" else STEP // (world_size * accumulate)
        return [
            StatefulLoader(
                dataset,
                batch_size,
                {source.name: SkippedRows(None, str(source.file.path), len(source), 1.0) for source in dataset.sources},
                weights=weights,
                shuffle=True,
                seed=3,
                num_workers=num_workers,
                rank=rank,
                world_size=world_size,
                batching=BATCHINGS[kind],
                batches_a_step=STEP // world_size if kind == "padded" else accumulate,  # a batch is one unit
            )
            for rank in range(world_size)
        ]

    return make


def units(batch: Batch) -> list[tuple[str, ...]]:
    """The ids of what stands in each row of the batch: of a pack, several. Batches of like length are one unit."""
    ids, segments_BT = iter(example["id"] for example in batch["examples"]), batch["segments_BT"]
    return [tuple(next(ids) for _ in range(int(segments_T.max()))) for segments_T in segments_BT]


def steps(ranks: list[StatefulLoader], number: int) -> list[Any]:
    """The next optimizer steps of an epoch: the units of each, sorted, of all processes and micro-batches together."""
    taken = [iter(loader) for loader in ranks]
    found = []
    for _ in range(number):
        batches = [batch for loader in taken for batch in (next(loader, None) for _ in range(ranks[0].batches.batches_a_step))]
        found.append(sorted(unit for batch in batches if batch is not None for unit in units(batch)))
    return found


@pytest.mark.parametrize("kind", BATCHINGS)
def test_a_step_has_the_same_rows_in_any_combination(make_ranks: MakeRanks, kind: str) -> None:
    expected = steps(make_ranks(kind, ALL[0]), NUM_STEPS)
    assert len({tuple(step) for step in expected if step}) > 2 and not expected[-1]
    assert (kind == "packed") == any(len(unit) > 1 for step in expected for unit in step)
    for combination in WITHOUT_WORKERS[1:]:
        assert steps(make_ranks(kind, combination), NUM_STEPS) == expected, combination


@pytest.mark.parametrize("num_workers", [1, 2])
def test_nor_do_workers_matter(make_ranks: MakeRanks, num_workers: int) -> None:
    expected = steps(make_ranks("packed", ALL[0]), 2)
    assert steps(make_ranks("packed", Combination(2, 2, num_workers)), 2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("combination", [combination for combination in ALL if combination.num_workers])
@pytest.mark.parametrize("kind", BATCHINGS)
def test_in_no_combination(make_ranks: MakeRanks, kind: str, combination: Combination) -> None:
    expected = steps(make_ranks(kind, ALL[0]), NUM_STEPS)
    assert steps(make_ranks(kind, combination), NUM_STEPS) == expected


@pytest.mark.parametrize("kind", BATCHINGS)
def test_each_step_may_be_taken_in_another_combination(make_ranks: MakeRanks, kind: str) -> None:
    """As after a resume, in the middle of an epoch; the counts of rows go along."""
    expected = [step for step in steps(make_ranks(kind, ALL[0]), NUM_STEPS) if step]
    chosen = random.Random(5)
    for _ in range(3):
        ranks, got = make_ranks(kind, chosen.choice(WITHOUT_WORKERS)), steps([], 0)
        for _ in expected:
            got += steps(ranks, 1)
            state = json.loads(json.dumps(StatefulLoader.together([loader.state_dict() for loader in ranks])))
            ranks = make_ranks(kind, chosen.choice(WITHOUT_WORKERS))
            for loader in ranks:
                loader.load_state_dict(state)
        assert got == expected
        counts = [loader.row_counts() for loader in ranks]
        trained, rows = (sum(count[name] for count in counts) for name in ("trained", "rows"))
        assert trained == sum(len(unit) for step in got for unit in step) and trained == rows == 130 + 122


def test_a_place_inside_of_a_batch_is_refused(make_ranks: MakeRanks) -> None:
    one, two = make_ranks("rows", Combination(1, 2, 0))[0], make_ranks("rows", Combination(1, 1, 0))[0]
    next(iter(one))
    with pytest.raises(ValueError, match=r"after 12 rows .*in the middle of a batch of 24"):
        two.load_state_dict(one.state_dict())
