"""Answers behind a prompt that they share, as literal tensors."""

from typing import Any

import torch

from datamodules.answer_form import AnswerForm
from datamodules.answer_rows import AnswerExample
from datamodules.batch import Example, MediaItem, Origin, answers_of_positions
from datamodules.branches import join, shared_length
from datamodules.collate import collate

X = -100
ROW = Origin("rows.jsonl", 3)


def picture(key: str = "cat", position: int = 1, size: int = 2) -> MediaItem:
    return MediaItem(key, torch.full((1, 2, 2), float(len(key))), size, position)


def side(answer: list[int], prompt: list[int], media: list[MediaItem], **options: Any) -> Example:
    labels = [X] * len(prompt) + answer
    return Example(ROW, "row", prompt + answer, labels, {"image": media} if media else {}, **options)


def example(role: Any, first: Example, others: list[Any], **options: Any) -> AnswerExample:
    return AnswerExample(**vars(first), role=role, others=others, **options)


PROMPT = [5, 7, 7, 6, 8]


def test_two_answers_share_their_prompt() -> None:
    chosen, rejected = side([11, 12], PROMPT, [picture()]), side([13, 12, 14], PROMPT, [picture()])
    assert shared_length([chosen, rejected]) == 4
    batch = collate([example("chosen", chosen, [("rejected", rejected)], margin=0.5)], pad_id=99)
    assert batch["tokens_BT"].tolist() == [[5, 7, 7, 6, 8, 11, 12, 8, 13, 12, 14]]
    assert batch["labels_BT"].tolist() == [[X, X, X, X, X, 11, 12, X, 13, 12, 14]]
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]]
    assert batch["branches_BT"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert batch["segments_BT"].tolist() == [[1] * 11]
    assert batch["image"]["item_O"].tolist() == [0] and batch["image"]["position_O"].tolist() == [1]
    assert answers_of_positions(batch).tolist() == [0, 0, 1, 1, 1]
    answers = batch["answers"]
    assert answers["roles"] == ["chosen", "rejected"] and answers["continues_B"] == [False]
    assert answers["row_A"].tolist() == [0, 0] and answers["branch_A"].tolist() == [1, 2]
    assert (
        answers["pairs_P2"].tolist() == [[0, 1]] and answers["margin_P"].tolist() == [0.5] and answers["weight_P"].tolist() == [1]
    )
    assert answers["media_pairs_M2"].shape == (0, 2)


def test_answers_that_begin_alike_share_the_prompt_alone() -> None:
    chosen, rejected = side([11, 12], PROMPT, []), side([11, 13], PROMPT, [])
    (row,) = join([chosen, rejected])
    assert row.tokens == [5, 7, 7, 6, 8, 11, 12, 8, 11, 13]


def test_identical_answers_are_compared_as_one() -> None:
    others = [("rejected", side([11], PROMPT, [])), ("rejected", side([12], PROMPT, []))]
    batch = collate([example("chosen", side([11], PROMPT, []), others, margin=2.0)], pad_id=0)
    assert batch["answers"]["pairs_P2"].tolist() == [[0, 0], [0, 2]] and batch["answers"]["margin_P"].tolist() == [2, 2]
    assert batch["answers"]["roles"] == ["chosen", "rejected", "rejected"]


def test_rows_of_their_own() -> None:
    chosen, rejected = side([11, 12], PROMPT, [picture()]), side([13], PROMPT, [picture()])
    for form, other in (
        (AnswerForm("pairs", shared_prompt=False), rejected),
        (AnswerForm("pairs"), side([13], PROMPT, [picture("dog")])),  # another picture in front
        (AnswerForm("pairs"), side([13], [5, 7, 7, 9, 8], [picture()])),  # shares less than half of the prompt
    ):
        batch = collate([example("chosen", chosen, [("rejected", other)], form=form)], pad_id=99)
        assert batch["tokens_BT"].tolist() == [[5, 7, 7, 6, 8, 11, 12], [*other.tokens, 99]]
        assert batch["branches_BT"].tolist() == [[1] * 7, [1] * 6 + [0]]
        assert batch["positions_BT"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 0]]
        assert batch["image"]["row_O"].tolist() == [0, 1]
        assert answers_of_positions(batch).tolist() == [0, 0, 1]
        assert batch["answers"]["continues_B"] == [False, True]
        assert batch["answers"]["pairs_P2"].tolist() == [[0, 1]]
        assert [described["line"] for described in batch["examples"]] == [3, 3]


def test_a_medium_is_never_cut_into_branches() -> None:
    prompt = [5, 6, 7, 7]
    sides = [side([11], prompt, [picture(position=2)]), side([12], prompt, [picture(position=2)])]
    assert shared_length(sides) == 0  # the last token of the prompt is the picture's
    assert [row.tokens for row in join(sides)] == [[5, 6, 7, 7, 11], [5, 6, 7, 7, 12]]


def test_media_that_take_no_tokens_stand_in_the_stretch_of_their_token() -> None:
    prompt = [5, 6, 8, 9]
    sides = [side([answer], prompt, [picture("a", 1, 0), picture("b", 3, 0)]) for answer in (11, 12)]
    (row,) = join(sides)
    assert row.tokens == [5, 6, 8, 9, 11, 9, 12]
    assert [(item.key, item.position) for item in row.media["image"]] == [("a", 1), ("b", 3), ("b", 5)]
    assert [item.position for item in sides[1].media["image"]] == [1, 3]


def test_media_within_an_answer_belong_to_its_branch() -> None:
    ends = [side([11, 12], PROMPT, [picture()]), side([13], PROMPT, [picture()])]
    ends[1].tokens += [7, 7, 15]
    ends[1].labels += [X, X, 15]
    ends[1].media["image"].append(picture("dog", 6))
    (row,) = join(ends)
    assert row.tokens == [5, 7, 7, 6, 8, 11, 12, 8, 13, 7, 7, 15]
    assert [(item.key, item.position) for item in row.media["image"]] == [("cat", 1), ("dog", 9)]


def test_several_rejected_answers_and_corrupted_media() -> None:
    answers = [side([number], PROMPT, [picture()]) for number in (11, 12, 13)]
    wrong = side([11], PROMPT, [picture("cat~1")])
    others = [("rejected", answers[1]), ("rejected", answers[2]), ("corrupted", wrong)]
    batch = collate(
        [example("chosen", answers[0], others, margin=2.0), example("chosen", answers[1], [("rejected", answers[0])])], 99
    )
    assert batch["tokens_BT"].shape == (3, 10)
    assert batch["answers"]["roles"] == ["chosen", "rejected", "rejected", "corrupted", "chosen", "rejected"]
    assert batch["answers"]["row_A"].tolist() == [0, 0, 0, 1, 2, 2]
    assert batch["answers"]["branch_A"].tolist() == [1, 2, 3, 1, 1, 2]
    assert batch["answers"]["pairs_P2"].tolist() == [[0, 1], [0, 2], [4, 5]]
    assert batch["answers"]["margin_P"].tolist() == [2, 2, 0]
    assert batch["answers"]["media_pairs_M2"].tolist() == [[0, 3]]
    assert batch["answers"]["continues_B"] == [False, True, False]
    assert answers_of_positions(batch).tolist() == [0, 1, 2, 3, 4, 5]
    keys = batch["answers"]["keys"]
    assert (keys[0], keys[1]) == (keys[5], keys[4]) and len(set(keys)) == 4
    assert batch["image"]["item_O"].tolist() == [0, 1, 0]  # the picture of both rows is encoded once


def feedback(answer: list[int], prompt: list[int], key: str = "cat", **options: Any) -> AnswerExample:
    form = AnswerForm("feedback", mismatched=True)
    return example("desirable", side(answer, prompt, [picture(key)]), [], form=form, **options)


def test_mismatched_answers_stand_behind_the_prompt_of_the_row() -> None:
    other_prompt = [5, 7, 7, 9, 8, 8]
    rows = [feedback([11, 12], PROMPT), feedback([13], PROMPT), feedback([14, 15, 16], other_prompt, "dog")]
    batch = collate(rows, pad_id=99)
    assert batch["answers"]["roles"] == ["desirable", "mismatched"] * 3
    assert batch["tokens_BT"].tolist() == [
        [5, 7, 7, 6, 8, 11, 12, 8, 14, 15, 16, 99],  # the next row has the same prompt: not its answer
        [5, 7, 7, 6, 8, 13, 8, 14, 15, 16, 99, 99],
        [5, 7, 7, 9, 8, 8, 14, 15, 16, 8, 11, 12],
    ]
    assert batch["image"]["item_O"].tolist() == [0, 0, 1]
    assert batch["answers"]["pairs_P2"].shape == (0, 2)


def test_a_mismatched_answer_that_does_not_fit_is_another_rows() -> None:
    rows = [feedback([11], PROMPT, max_length=7), feedback([13] * 3, [6] * 5, "dog"), feedback([14], [9] * 5, "ox")]
    batch = collate(rows, pad_id=99)
    assert batch["tokens_BT"][0, 4:9].tolist() == [8, 11, 8, 14, 99]
    assert collate(rows[:1], pad_id=99)["answers"]["roles"] == ["desirable"]


def test_rows_without_answers_stay_as_they_are() -> None:
    batch = collate([side([11], PROMPT, [])], pad_id=99)
    assert "answers" not in batch and "branches_BT" not in batch
