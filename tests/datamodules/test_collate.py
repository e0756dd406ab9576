"""Batches as literal tensors.

Shape suffixes: B rows, T tokens, N unique media items, S supervised positions, K choices.
"""

from typing import Literal

import pytest
import torch
from torch import Tensor

from datamodules.batch import Example, MediaItem, Origin, RowError
from datamodules.collate import collate

PAD = 99
IGNORED = -100


def picture(number: float) -> Tensor:
    return torch.full((1, 2, 2), number)


def examples() -> list[Example]:
    """Three rows: two pictures and a closed answer, an open answer, and a picture of the first again."""
    cat, dog = MediaItem("cat", picture(0.5), 2, 0), MediaItem("dog", picture(0.25), 1, 3)
    return [
        Example(
            origin=Origin("rows.jsonl", 1),
            id="first",
            tokens=[7, 7, 5, 7, 11, 12],
            labels=[IGNORED] * 4 + [11, 12],
            media={"image": [cat, dog]},
            choices=[[11, 13, 14], [12]],
            prompt="<image>Which? <image>",
            reference="cat",
        ),
        Example(Origin("rows.jsonl", 4), "second", [5, 21, 22], [IGNORED, 21, 22], num_dropped_tokens=3),
        Example(
            origin=Origin("rows.jsonl", 9),
            id="third",
            tokens=[7, 7, 31, 32],
            labels=[IGNORED, IGNORED, 31, IGNORED],
            media={"image": [MediaItem("cat", picture(0.5), 2, 0)]},
            choices=[[31, 33]],
            num_dropped_tokens=2,
        ),
    ]


def test_rows_are_padded_on_the_right() -> None:
    batch = collate(examples(), PAD)
    assert batch["tokens_BT"].tolist() == [[7, 7, 5, 7, 11, 12], [5, 21, 22, PAD, PAD, PAD], [7, 7, 31, 32, PAD, PAD]]
    assert batch["labels_BT"].tolist() == [
        [IGNORED, IGNORED, IGNORED, IGNORED, 11, 12],
        [IGNORED, 21, 22, IGNORED, IGNORED, IGNORED],
        [IGNORED, IGNORED, 31, IGNORED, IGNORED, IGNORED],
    ]
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 0]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]


def test_rows_are_padded_on_the_left_for_generation() -> None:
    prompts = examples()
    for prompt in prompts:
        prompt.labels, prompt.choices = [IGNORED] * len(prompt.tokens), None
    batch = collate(prompts, PAD, "left")
    assert batch["tokens_BT"].tolist() == [[7, 7, 5, 7, 11, 12], [PAD, PAD, PAD, 5, 21, 22], [PAD, PAD, 7, 7, 31, 32]]
    assert batch["labels_BT"].tolist() == [[IGNORED] * 6] * 3
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 2, 3]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    assert batch["choices_SK"].shape == (0, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_choices_follow_the_supervised_positions_in_row_major_order(side: Literal["left", "right"]) -> None:
    batch = collate(examples(), PAD, side)
    assert batch["choices_SK"].tolist() == [[11, 13, 14], [12, -1, -1], [-1, -1, -1], [-1, -1, -1], [31, 33, -1]]
    assert batch["labels_BT"][batch["labels_BT"] != IGNORED].tolist() == [11, 12, 21, 22, 31]


def test_a_medium_is_stacked_once() -> None:
    image = collate(examples(), PAD)["image"]
    assert torch.equal(image["media"], torch.stack([picture(0.5), picture(0.25)]))
    assert image["mask"] is None
    assert image["item_O"].tolist() == [0, 1, 0]
    assert image["row_O"].tolist() == [0, 0, 2]
    assert image["num_tokens_O"].tolist() == [2, 1, 2]


def test_the_place_of_a_medium_moves_with_the_padding() -> None:
    shorter = examples()
    shorter[2].media["image"][0].position = 4  # behind the last token
    assert collate(shorter, PAD)["image"]["position_O"].tolist() == [0, 3, 4]
    for prompt in shorter:
        prompt.labels, prompt.choices = [IGNORED] * len(prompt.tokens), None
    assert collate(shorter, PAD, "left")["image"]["position_O"].tolist() == [0, 3, 6]


def test_what_tables_and_counts_need_comes_along() -> None:
    error = RowError(Origin("rows.jsonl", 5), "no picture")
    first, second, third = examples()
    batch = collate([first, error, second, third], PAD)
    assert batch["examples"][0] == {
        "id": "first",
        "file": "rows.jsonl",
        "line": 1,
        "prompt": "<image>Which? <image>",
        "reference": "cat",
    }
    assert [(row["id"], row["line"]) for row in batch["examples"]] == [("first", 1), ("second", 4), ("third", 9)]
    assert batch["skipped"] == [error]
    assert batch["num_dropped_tokens"] == 5


@pytest.mark.parametrize(("side", "num_supervised"), [("right", 4), ("left", 5)])
def test_tokens_and_labels_are_counted(side: Literal["left", "right"], num_supervised: int) -> None:
    """A label at the very first place of a row is predicted from nothing; on the left, padding stands before it."""
    rows = examples()
    rows[1].labels = [5, 21, IGNORED]
    batch = collate(rows, PAD, side)
    assert (batch["num_tokens"], batch["num_supervised"]) == (13, num_supervised)
    assert type(batch["num_tokens"]) is type(batch["num_supervised"]) is int
    nothing = collate([], PAD, side)
    assert (nothing["num_tokens"], nothing["num_supervised"]) == (0, 0)


def test_the_other_rows_do_not_see_a_skipped_one() -> None:
    first, _, third = examples()
    batch = collate([first, RowError(Origin("rows.jsonl", 4), "no picture"), third], PAD)
    alone = collate([first, third], PAD)
    assert torch.equal(batch["tokens_BT"], alone["tokens_BT"])
    assert torch.equal(batch["choices_SK"], alone["choices_SK"])
    assert batch["image"]["row_O"].tolist() == [0, 0, 1]


def test_a_batch_without_rows_is_empty() -> None:
    errors = [RowError(Origin("rows.jsonl", line), "no picture") for line in (1, 2)]
    for items in (errors, []):
        batch = collate(items, PAD)
        assert batch["examples"] == [] and batch["skipped"] == items and "image" not in batch
        for tensor in (batch["tokens_BT"], batch["labels_BT"], batch["positions_BT"], batch["segments_BT"], batch["choices_SK"]):
            assert tensor.shape == (0, 0) and tensor.dtype == torch.long


def test_a_batch_of_texts_has_no_images() -> None:
    batch = collate(examples()[1:2], PAD)
    assert batch["tokens_BT"].tolist() == [[5, 21, 22]] and "image" not in batch
