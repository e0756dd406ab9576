import dataclasses
import random
from typing import Any

import pytest

from datamodules.batch import Origin, RowError
from datamodules.conversation import Media, Message, Text, parse_row

ORIGIN = Origin("rows.jsonl", 7)
Row = dict[str, Any]


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any, **keys: Any) -> Row:
    return {"role": "assistant", "content": content, **keys}


def system(content: Any) -> Row:
    return {"role": "system", "content": content}


def test_media_fill_placeholders_of_their_modality_in_order_over_all_turns():
    rng = random.Random(3)
    sources = {m: [f"{m}{rng.random()}" for _ in range(6)] for m in ("image", "video", "audio")}
    tags = [m for m in sources for _ in range(6)]
    rng.shuffle(tags)
    cuts = [tags[:5], tags[5:11], tags[11:]]
    messages: list[Row] = []
    for part in cuts:
        messages += [user(" ".join(f"<{tag}>" for tag in part) + "?"), assistant("Yes.")]
    sample = parse_row({"messages": messages, **{f"{m}s": list(s) for m, s in sources.items()}}, ORIGIN)
    for modality in sources:
        assert [media.source for media in sample.media(modality)] == sources[modality]
    assert [message.text for message in sample.messages] == [message["content"] for message in messages]
    rest = {m: iter(s) for m, s in sources.items()}
    in_order = [piece for message in sample.messages for piece in message.content if isinstance(piece, Media)]
    assert in_order == [Media(tag, next(rest[tag])) for tag in tags]


def test_parts_of_every_kind():
    parts = [
        {"type": "video_url", "video_url": {"url": "v.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "a.flac"}},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {"type": "video", "path": "w.mp4"},
        {"type": "audio", "audio": {"path": "b.wav"}},
        {"type": "image", "url": "data:image/png;base64,iVBO"},
        {"type": "image"},
        {"type": "text", "text": "Which?"},
    ]
    sample = parse_row({"messages": [user(parts), assistant("None.")], "images": ["last.png"]}, ORIGIN)
    assert sample.messages[0].content == (
        Media("video", "v.mp4"),
        Media("audio", "a.flac"),
        Media("audio", "data:audio/wav;base64,UklGRg=="),
        Media("video", "w.mp4"),
        Media("audio", "b.wav"),
        Media("image", "data:image/png;base64,iVBO"),
        Media("image", "last.png"),
        Text("Which?"),
    )


def test_systems_turns_tools_and_loss():
    messages = [user("q1"), assistant("a1", loss=False), user("q2"), assistant("call"), {"role": "tool", "content": "r1"}]
    messages += [{"role": "tool", "content": "<image>"}, assistant("a2")]
    row = {"system": "Be brief.", "messages": messages, "images": ["r2.png"], "id": 12, "solution": [1, 2], "label": True}
    sample = parse_row(row, ORIGIN)
    roles = ["system", "user", "assistant", "user", "assistant", "tool", "tool", "assistant"]
    assert [message.role for message in sample.messages] == roles
    assert [message.supervised for message in sample.messages] == [False, False, False, False, True, False, False, True]
    assert (sample.id, sample.columns) == ("12", {"solution": [1, 2], "label": True})
    in_list = parse_row({**row, "system": None, "messages": [system("Be brief."), *messages]}, ORIGIN)
    assert in_list == sample
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.id = "13"  # type: ignore[misc]


def test_an_empty_system_message_is_kept_and_an_empty_system_key_is_none():
    turns = [user("q"), assistant("a")]
    assert parse_row({"messages": [system(""), *turns]}, ORIGIN).messages[0] == Message("system", ())
    assert parse_row({"messages": turns, "system": ""}, ORIGIN).messages[0].role == "user"


@pytest.mark.parametrize(
    "row, template",
    [
        ({"messages": [user("q")]}, None),
        ({"messages": [user("q"), assistant(" ")]}, None),
        ({"conversations": [{"from": "human", "value": "q"}]}, None),
        ({"query": "q"}, None),
        ({"instruction": "q", "input": "", "output": ""}, None),
        ({"question": "q"}, "{question}"),
        ({"question": "q", "answer": None}, "{question}"),
        ({"question": "q", "answer": ""}, "{question}"),
    ],
)
def test_rows_without_an_answer_serve_prediction_only(row, template):
    sample = parse_row(row, ORIGIN, prompt_template=template, require_answer=False)
    assert sample.messages == (Message("user", (Text("q"),)),)
    with pytest.raises(RowError, match=r"no answer to train on: expected|the answer is empty"):
        parse_row(row, ORIGIN, prompt_template=template)


def test_an_answer_is_kept_where_none_is_required():
    row = {"messages": [user("<image>q"), assistant("a")], "image": "x.png"}
    assert parse_row(row, ORIGIN, require_answer=False) == parse_row(row, ORIGIN)
    unsupervised = {"messages": [user("q"), assistant("a", loss=False)]}
    assert parse_row(unsupervised, ORIGIN, require_answer=False).messages[1].text == "a"


def test_choices():
    row = {"messages": [user("cat or dog?"), assistant("dog")], "choices": ["cat", "dog"]}
    sample = parse_row(row, ORIGIN)
    assert (sample.choices, sample.columns) == (("cat", "dog"), {})
    asked = {**row, "messages": [user("cat or dog?")]}
    assert parse_row(asked, ORIGIN, require_answer=False).choices == ("cat", "dog")


TURN = [user("q"), assistant("a")]
REFUSED: dict[str, tuple[Row, str]] = {
    "no form": ({"question": "q", "x": 1}, "the keys 'question', 'x', which is none of the known forms"),
    "no form, which there are": ({"x": 1}, '{"conversations": ['),
    "nothing": ({}, "the row has no keys"),
    "messages are a text": ({"messages": "hi"}, "'messages' must be a list of messages, got a text"),
    "messages are empty": ({"messages": []}, "'messages' is an empty list"),
    "a message is a text": ({"messages": ["hi"]}, "message 1 must be an object with 'role' and 'content', got a text"),
    "a message lacks content": ({"messages": [{"role": "user"}]}, "but has the keys 'role'"),
    "sharegpt keys in messages": ({"messages": [{"from": "human", "value": "q"}]}, "has the keys 'from', 'value'"),
    "an unread key": (
        {"messages": [user("q"), assistant("a", tool_calls=[1])]},
        "message 2 has the keys 'tool_calls', which would",
    ),
    "unknown role": (
        {"messages": [{"role": "bot", "content": "x"}]},
        "message 1 has the unknown role 'bot': expected one of system",
    ),
    "role is no text": ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role ['user']"),
    "native role in conversations": ({"conversations": [{"from": "tool", "value": "x"}]}, "unknown role 'tool'"),
    "loss is a number": (
        {"messages": [user("q"), assistant("a", loss=1)]},
        "message 2: 'loss' must be true or false, got a number",
    ),
    "loss on a user": ({"messages": [{**user("q"), "loss": True}, assistant("a")]}, 'message 1 has "loss": true'),
    "content is null": (
        {"messages": [user("q"), assistant(None)]},
        "content of message 2 must be a text or a list of parts, got null",
    ),
    "content is a number": ({"messages": [user(3), assistant("a")]}, "got a number"),
    "part is a text": ({"messages": [user(["q"]), assistant("a")]}, "part 1 of message 1 is not understood: q"),
    "unknown part": ({"messages": [user([{"type": "file"}]), assistant("a")]}, "part 1 of message 1 is not understood"),
    "part without url": ({"messages": [user([{"type": "image_url"}]), assistant("a")]}, "part 1 of message 1 must be a path"),
    "audio part without data": (
        {"messages": [user([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]), assistant("a")]},
        "part 1 of message 1 is not understood",
    ),
    "assistant first": ({"messages": [assistant("a"), *TURN]}, "message 1 has the role assistant, but the first message must"),
    "system later": (
        {"messages": [user("q"), system("s"), assistant("a")]},
        "message 2 has the role system, but a message after",
    ),
    "two systems": ({"system": "s", "messages": [system("t"), *TURN]}, "after the role system must have the role user"),
    "two users": ({"messages": [user("q"), *TURN]}, "message 2 has the role user"),
    "two assistants": ({"messages": [*TURN, assistant("a")]}, "message 3 has the role assistant"),
    "tool before an assistant": (
        {"messages": [user("q"), {"role": "tool", "content": "r"}, assistant("a")]},
        "message 2 has the role tool",
    ),
    "no user": ({"messages": [system("s")]}, "no user message"),
    "ends with the user": (
        {"messages": [*TURN, user("q")]},
        "no answer to train on: expected a last message of the role assistant",
    ),
    "ends with a tool": ({"messages": [*TURN, {"role": "tool", "content": "r"}]}, "no answer to train on"),
    "nothing supervised": ({"messages": [user("q"), assistant("a", loss=False)]}, 'every assistant message has "loss": false'),
    "empty answer": ({"messages": [user("q"), assistant(" \n\t")]}, "message 2: the answer is empty"),
    "no parts in the answer": ({"messages": [user("q"), assistant([])]}, "message 2: the answer is empty"),
    "empty answer in the middle": ({"messages": [user("q"), assistant(""), *TURN]}, "message 2: the answer is empty"),
    "empty question": ({"messages": [user(" "), assistant("a")]}, "message 1: the user message is empty"),
    "empty query": ({"query": "", "response": "a"}, "'query': the user message is empty"),
    "query is a list": ({"query": ["q"], "response": "a"}, "'query' must be a text, got a list"),
    "output is a number": ({"instruction": "q", "output": 4}, "'output' must be a text, got a number"),
    "history is a text": ({"query": "q", "response": "a", "history": "h"}, "'history' must be a list"),
    "history of triples": ({"query": "q", "response": "a", "history": [["a", "b"], ["a", "b", "c"]]}, "pair 2 of 'history'"),
    "system is a list": ({"messages": TURN, "system": []}, "'system' must be a text, got a list"),
    "too few images": (
        {"messages": [user("<image><image>q"), assistant("a")], "images": ["x"]},
        "2 <image> in the messages, but 1 in",
    ),
    "too many images": (
        {"messages": [user("<image>q"), assistant("a")], "images": ["x", "y"]},
        "1 <image> in the messages, but 2 in",
    ),
    "no images": ({"messages": [user("<image>q"), assistant("a")]}, "1 <image> in the messages, but 0 in 'images'"),
    "other modality": (
        {"messages": [user("<image>q"), assistant("a")], "video": "v"},
        "1 <image> in the messages, but 0 in 'images'",
    ),
    "implied in native": ({"messages": TURN, "images": ["x"]}, "but 1 in 'images': write one <image> for each, where it belongs"),
    "implied in alpaca": ({"instruction": "q", "output": "a", "audio": "x"}, "0 <audio> in the messages, but 1 in 'audios'"),
    "two implied in llava": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "image": ["x", "y"]},
        "0 <image> in the messages, but 2 in 'images'",
    ),
    "image and images": ({"messages": TURN, "image": "x", "images": ["x"]}, "both 'image' and 'images'"),
    "image is a number": (
        {"messages": [user("<image>q"), assistant("a")], "images": ["x", 3]},
        "item 2 of 'images' must be a path",
    ),
    "image is empty": ({"messages": [user("<image>q"), assistant("a")], "image": ""}, "item 1 of 'image' must be a path"),
    "image with more keys": (
        {"messages": [user("<image>q"), assistant("a")], "images": [{"path": "x", "start": 2}]},
        "item 1 of 'images' must be a path, a data: URI, or an object with nothing but 'path' or 'url', got an object",
    ),
    "media in an answer": (
        {"messages": [user("q"), assistant("<image>")], "images": ["x"]},
        "message 2 has the role assistant and holds",
    ),
    "media in a system": (
        {"system": "<image>", "messages": TURN, "images": ["x"]},
        "'system' has the role system and holds media",
    ),
    "preference without a prompt": ({"chosen": "a", "rejected": "b"}, "'chosen' is a text and there is no 'prompt'"),
    "chosen is a number": ({"prompt": "q", "chosen": 3}, "'chosen' must be a list of messages, got a number"),
    "a message of chosen": ({"prompt": "q", "chosen": [{"role": "bot", "content": ""}]}, "message 1 of 'chosen' has the unknown"),
    "chosen is the question": ({"chosen": [user("q")]}, "expected an assistant's message at the end of 'chosen', but the row"),
    "nothing in the prompt": ({"prompt": [], "chosen": "a"}, "'prompt' is an empty list"),
    "two implied in a preference": (
        {"prompt": "q", "chosen": "a", "images": ["x", "y"]},
        "0 <image> in the messages, but 2 in 'images'",
    ),
    "id is a list": ({"messages": TURN, "id": [1]}, "'id' must be a text or a whole number, got a list"),
    "id is true": ({"messages": TURN, "id": True}, "'id' must be"),
    "choices are a text": (
        {"messages": TURN, "choices": "a"},
        "'choices' must be a list of texts, none of them empty, got a text",
    ),
    "choices are empty": ({"messages": TURN, "choices": []}, "'choices' must be a list"),
    "an empty choice": ({"messages": TURN, "choices": ["a", " "]}, "none of them empty"),
    "a choice twice": ({"messages": TURN, "choices": ["a", "b", "a"]}, "'choices' must differ"),
    "another answer": ({"messages": TURN, "choices": ["b", "c"]}, "the answer 'a' is not one of the 'choices' ['b', 'c']"),
}


@pytest.mark.parametrize("row, reason", REFUSED.values(), ids=REFUSED.keys())
def test_a_row_that_cannot_be_used_is_refused_with_its_reason(row, reason):
    with pytest.raises(RowError) as caught:
        parse_row(row, ORIGIN)
    assert caught.value.origin == ORIGIN
    assert reason in caught.value.reason
