"""What a row says: when two say the same, closed answers, and sides that are the same."""

from typing import Any

from datamodules.answers import parse_answers
from datamodules.batch import Origin
from datamodules.conversation import Sample, parse_row
from inspection.texts import question_and_answer, read_text


def sample(question: str = "Which?", answer: str = "red", **columns: Any) -> Sample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return parse_row({"messages": messages, **columns}, Origin("rows.jsonl", 1))


def pair(**columns: Any) -> list[Sample]:
    row = {"prompt": "<image>Which?", "images": ["a.png"], "chosen": "red", **columns}
    return [answer.sample for answer in parse_answers(row, Origin("rows.jsonl", 1), "pairs").answers]


def test_capitals_and_white_space_say_nothing() -> None:
    digest = read_text([sample("Which  colour?\n", "Red")]).digest
    assert read_text([sample("which colour?", " red ")]).digest == digest
    for other in (
        sample("which colour", "red"),
        sample("which", "colour? red"),
        sample("<image>which colour?", "red", image="a"),
    ):
        assert read_text([other]).digest != digest


def test_a_closed_answer_has_a_place_among_its_choices() -> None:
    text = read_text([sample(choices=["blue", "red", "green"])])
    assert (text.answer, text.place, text.num_choices) == ("red", 1, 3)
    assert read_text([sample()]).num_choices == 0


def test_sides_are_the_same_where_answer_and_media_are() -> None:
    assert read_text(pair(rejected="red")).has_same_sides
    assert not read_text(pair(rejected="blue")).has_same_sides
    assert not read_text(pair(rejected="red", rejected_images=["b.png"])).has_same_sides
    assert read_text(pair(rejected=["blue", "red"])).has_same_sides
    assert read_text([sample(rejected_response="Red")]).has_same_sides  # an objective with one answer leaves it in its column
    assert not read_text([sample(rejected_response="blue")]).has_same_sides
    assert not read_text([sample("<image>Which?", images=["a"], rejected="red", rejected_images=["b"])]).has_same_sides


def test_a_scorer_reads_the_last_question_and_its_answer() -> None:
    messages = [("user", "<image>Hello"), ("assistant", "Hi."), ("user", "<image>What is it?"), ("assistant", "A bus.")]
    row = {"messages": [{"role": role, "content": text} for role, text in messages], "images": ["a", "b"]}
    assert question_and_answer(parse_row(row, Origin("rows.jsonl", 1))) == "What is it? A bus."
