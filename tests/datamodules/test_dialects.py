import copy
import dataclasses
from typing import Any

import pytest

from datamodules.batch import Origin, RowError
from datamodules.conversation import Media, Message, Sample, Text, parse_row
from datamodules.prompt_template import PromptTemplate

ORIGIN = Origin("rows.jsonl", 7)
Row = dict[str, Any]


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any, **keys: Any) -> Row:
    return {"role": "assistant", "content": content, **keys}


BUS = Sample(
    ORIGIN,
    "7",
    (
        Message("user", (Media("image", "bus.jpg"), Text("What is this?"))),
        Message("assistant", (Text("A bus."),), supervised=True),
    ),
)
PART = {"type": "text", "text": "What is this?"}
BUS_ROWS: dict[str, Row] = {
    "native": {"messages": [user("<image>What is this?"), assistant("A bus.")], "images": ["bus.jpg"]},
    "native, one path": {"messages": [user("<image>What is this?"), assistant("A bus.")], "images": "bus.jpg"},
    "native, singular": {"messages": [user("<image>What is this?"), assistant("A bus.")], "image": "bus.jpg"},
    "native, objects": {"messages": [user("<image>What is this?"), assistant("A bus.")], "images": [{"path": "bus.jpg"}]},
    "native, url": {
        "messages": [user("<image>What is this?"), assistant("A bus.")],
        "images": [{"url": "bus.jpg", "path": None}],
    },
    "native, nulls": {
        "id": None,
        "messages": [{**user("<image>What is this?"), "loss": None, "name": None}, assistant("A bus.", loss=True)],
        "images": ["bus.jpg"],
        "videos": None,
        "audios": [],
        "system": None,
        "choices": None,
    },
    "parts": {"messages": [user([{"type": "image_url", "image_url": {"url": "bus.jpg"}}, PART]), assistant("A bus.")]},
    "parts, url as text": {"messages": [user([{"type": "image_url", "image_url": "bus.jpg"}, PART]), assistant("A bus.")]},
    "parts, detail": {
        "messages": [
            user([{"type": "image_url", "image_url": {"url": "bus.jpg", "detail": "low"}}, PART]),
            assistant([{"type": "text", "text": "A "}, {"type": "text", "text": "bus."}]),
        ]
    },
    "parts, filled from the list": {"messages": [user([{"type": "image"}, PART]), assistant("A bus.")], "images": ["bus.jpg"]},
    "parts, with path": {"messages": [user([{"type": "image", "image": "bus.jpg"}, PART]), assistant("A bus.")]},
    "parts, placeholder in a text": {
        "messages": [user([{"type": "text", "text": "<image>What is this?"}]), assistant("A bus.")],
        "images": ["bus.jpg"],
    },
    "llava": {
        "image": "bus.jpg",
        "conversations": [{"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "A bus."}],
    },
    "llava, implied": {
        "image": ["bus.jpg"],
        "conversations": [{"from": "user", "value": "What is this?"}, {"from": "assistant", "value": "A bus."}],
    },
    "query": {"query": "<image>What is this?", "response": "A bus.", "images": ["bus.jpg"], "history": []},
    "preference": {"prompt": "<image>What is this?", "chosen": "A bus.", "images": ["bus.jpg"]},
    "preference, implied": {"prompt": "What is this?", "chosen": "A bus.", "image": "bus.jpg"},
    "preference, messages": {
        "prompt": [user([{"type": "image"}, PART])],
        "chosen": [assistant("A bus.")],
        "images": ["bus.jpg"],
    },
    "preference, whole": {"chosen": [user("<image>What is this?"), assistant("A bus.")], "images": ["bus.jpg"]},
    "alpaca": {"instruction": "<image>What is this?", "input": "", "output": "A bus.", "images": ["bus.jpg"], "system": ""},
}


@pytest.mark.parametrize("row", BUS_ROWS.values(), ids=BUS_ROWS.keys())
def test_every_form_becomes_the_same_sample(row):
    before = copy.deepcopy(row)
    sample = parse_row(row, ORIGIN)
    assert sample.columns == {key: value for key, value in row.items() if key == "chosen"}
    assert dataclasses.replace(sample, columns={}) == BUS
    assert row == before


@pytest.mark.parametrize(
    "row, template",
    [
        ({"image": "bus.jpg", "question": "What is this?", "answer": "A bus."}, "{question}"),
        ({"image": "bus.jpg", "question": "What is this?", "answer": "A bus."}, "<image>{question}"),
        ({"images": ["bus.jpg"], "question": "<image>What is this?", "answer": "A bus."}, "{question}"),
        ({"image": "bus.jpg", "a": "What", "b b": "this?", "answer": "A bus."}, "{a} is {b b}"),
        ({"image": "bus.jpg", "instruction": "What is this?", "answer": "A bus."}, "{instruction}"),
        (BUS_ROWS["native"], "{question}"),
    ],
)
def test_flat_rows_become_the_same_sample(row, template):
    assert parse_row(row, ORIGIN, prompt_template=template) == BUS


def test_a_form_whose_key_is_null_is_passed_over():
    row = {**BUS_ROWS["llava"], "messages": None}
    assert parse_row(row, ORIGIN).messages == BUS.messages
    with pytest.raises(RowError, match="none of the known forms"):
        parse_row({**row, "conversations": None}, ORIGIN)


def test_media_of_a_flat_row_stand_before_the_text_unless_the_template_places_them():
    row = {"images": ["a.png", "b.png"], "audio": "c.wav", "n": 2.5, "label": 3}
    sample = parse_row(row, ORIGIN, prompt_template="{{{n}}}: count", answer_column="label")
    assert sample.messages[0].content == (
        Media("image", "a.png"),
        Media("image", "b.png"),
        Media("audio", "c.wav"),
        Text("{2.5}: count"),
    )
    assert sample.messages[1] == Message("assistant", (Text("3"),), supervised=True)
    placed = parse_row(row, ORIGIN, prompt_template="From <image> to <image>?", answer_column="label")
    assert placed.messages[0].text == "<audio>From <image> to <image>?"
    assert placed.columns == {"n": 2.5}


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q3", "response": "a3", "history": [["q1", "a1"], ["q2", "a2"]], "system": "s"},
        {"instruction": "q3", "output": "a3", "history": [["q1", "a1"], ["q2", "a2"]], "system": "s"},
        {
            "system": "s",
            "conversations": [
                {"from": "human" if number % 2 else "gpt", "value": f"{'q' if number % 2 else 'a'}{(number + 1) // 2}"}
                for number in range(1, 7)
            ],
        },
    ],
)
def test_history_comes_first_and_is_supervised(row):
    sample = parse_row(row, ORIGIN)
    assert [message.text for message in sample.messages] == ["s", "q1", "a1", "q2", "a2", "q3", "a3"]
    assert [message.supervised for message in sample.messages] == [False, False, True, False, True, False, True]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("a.png", "b.png"), ([assistant("a.png")], [assistant("b.png")])],
)
def test_both_sides_of_a_preference_row_stay_among_its_columns(chosen, rejected):
    sample = parse_row({"system": "s", "prompt": "q", "chosen": chosen, "rejected": rejected, "margin": 2}, ORIGIN)
    assert [(message.role, message.text) for message in sample.messages] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a.png"),
    ]
    assert sample.columns == {"chosen": chosen, "rejected": rejected, "margin": 2}
    native = {"messages": [user("q"), assistant("a.png")], "rejected_response": "b.png"}
    assert parse_row(native, ORIGIN).columns == {"rejected_response": "b.png"}


def test_what_stands_in_the_prompt_of_a_preference_row_is_not_learnt():
    prompt = [user("q1"), assistant("a1"), user("q2"), assistant("a2", loss=True), user("q3")]
    sample = parse_row({"prompt": prompt, "chosen": [assistant("a3")], "rejected": "no"}, ORIGIN)
    assert [message.supervised for message in sample.messages] == [False, False, False, True, False, True]
    whole = parse_row({"chosen": [*prompt, assistant("a3")], "rejected": [*prompt, assistant("no")]}, ORIGIN)
    assert [message.supervised for message in whole.messages] == [False, True, False, True, False, True]


def test_a_preference_row_without_an_answer_serves_prediction():
    sample = parse_row({"prompt": "q", "chosen": ""}, ORIGIN, require_answer=False)
    assert sample.messages == (Message("user", (Text("q"),)),)


def test_a_flat_row_has_system_and_history_like_the_others():
    row = {"question": "q2", "answer": "a2", "system": "s", "history": [["q1", "a1"]], "image": "x.png"}
    sample = parse_row(row, ORIGIN, prompt_template="Q: {question}")
    texts = [message.text for message in sample.messages]
    assert texts == ["s", "<image>q1", "a1", "Q: q2", "a2"] and sample.columns == {}
    placed = parse_row(row, ORIGIN, prompt_template="<image>{question}")
    assert [message.text for message in placed.messages] == ["s", "q1", "a1", "<image>q2", "a2"]
    with pytest.raises(RowError, match="'history' must be a list of"):
        parse_row({**row, "history": "long"}, ORIGIN, prompt_template="{question}")


def test_a_column_that_the_template_names_is_no_system_message():
    row = {"system": "Linux", "history": "old", "answer": "a"}
    sample = parse_row(row, ORIGIN, prompt_template="{system} is {history}")
    assert [message.text for message in sample.messages] == ["Linux is old", "a"] and sample.columns == {}


def test_alpaca_joins_instruction_and_input():
    sample = parse_row({"instruction": "Translate.", "input": "bus", "output": "Bus", "source": "x"}, ORIGIN)
    assert (sample.messages[0].text, sample.columns) == ("Translate.\nbus", {"source": "x"})


FLAT_REFUSED: dict[str, tuple[Row, str]] = {
    "missing column": ({"query": "q", "answer": "a"}, "the column 'question', but the row has the keys 'query', 'answer'"),
    "no answer": ({"question": "q", "label": "a"}, "expected the column 'answer', but the row has the keys 'question', 'label'"),
    "empty answer": ({"question": "q", "answer": " "}, "the column 'answer': the answer is empty"),
    "list in a column": ({"question": ["q"], "answer": "a"}, "the column 'question' must hold a text or a number, got a list"),
    "null in a column": ({"question": None, "answer": "a"}, "the column 'question' must hold a text or a number, got null"),
    "truth for an answer": ({"question": "q", "answer": True}, "the column 'answer' must hold a text or a number, got true"),
    "more placeholders": ({"question": "<image><image>q", "answer": "a", "image": "x"}, "2 <image> in the messages, but 1"),
}


@pytest.mark.parametrize("row, reason", FLAT_REFUSED.values(), ids=FLAT_REFUSED.keys())
def test_a_flat_row_that_cannot_be_used_is_refused_with_its_reason(row, reason):
    with pytest.raises(RowError) as caught:
        parse_row(row, ORIGIN, prompt_template="Question: {question}")
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "text", ["{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{ a}", "{", "}", "{a", "{image}", "{audios}"]
)
def test_a_template_takes_plain_columns_only(text):
    with pytest.raises(ValueError, match="prompt_template"):
        PromptTemplate(text)
    with pytest.raises(ValueError, match="prompt_template") as caught:
        parse_row({"a": "x"}, ORIGIN, prompt_template=text)
    assert not isinstance(caught.value, RowError)  # it is the option that is wrong, not the row


def test_a_template_does_not_read_the_braces_of_a_column():
    template = PromptTemplate("{{{a}}} {b}")
    assert template.columns == {"a", "b"}
    assert template.render({"a": "{b}", "b": "}{", "c": 1}) == "{{b}} }{"
