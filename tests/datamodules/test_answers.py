"""Preference rows of every form are read to the same conversations."""

import json
from typing import Any, Literal

import pytest

from datamodules.answers import Candidates, parse_answers
from datamodules.batch import Origin, RowError
from datamodules.content import Media
from datamodules.conversation import Sample, parse_row

ORIGIN = Origin("rows.jsonl", 7)
ASKED = {"role": "user", "content": "<image>What is it?"}
NATIVE = {"messages": [ASKED, {"role": "assistant", "content": "A bus."}], "images": ["a.jpg"]}


def read(row: dict[str, Any], kind: Literal["pairs", "feedback"] = "pairs", **options: Any) -> Candidates:
    return parse_answers(row, ORIGIN, kind, **options)


def texts(sample: Sample) -> list[tuple[str, str, bool]]:
    return [(message.role, message.text, message.supervised) for message in sample.messages]


def says(answer: str, question: str = "<image>What is it?") -> list[tuple[str, str, bool]]:
    return [("user", question, False), ("assistant", answer, True)]


def rlhf_v(**other: Any) -> dict[str, Any]:
    return {"question": "What is it?", "chosen": "A bus.", "rejected": "A cat."} | other


def completion(response: str, *ratings: int) -> dict[str, Any]:
    aspects = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
    annotations = {aspect: {"Rating": str(rating), "Rationale": "so"} for aspect, rating in zip(aspects, ratings, strict=True)}
    return {"model": "m", "response": response, "annotations": annotations}


VL = [completion("A cat.", 1, 2, 5), completion("A bus.", 5, 4, 5), completion("A red bus.", 4, 5, 4)]
LLAVA = {
    "id": "x",
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>What is it?"}],
    "output_1": {"from": "llm", "value": "A cat."},
    "output_2": {"from": "llm", "value": "A bus."},
    "preference": 2,
    "hallucination": False,
}

FORMS: dict[str, dict[str, Any]] = {
    "ms-swift text": NATIVE | {"rejected_response": "A cat."},
    "ms-swift messages in place": NATIVE | {"rejected_response": [{"role": "assistant", "content": "A cat."}]},
    "ms-swift whole messages": NATIVE | {"rejected_messages": [ASKED, {"role": "assistant", "content": "A cat."}]},
    "TRL": {"prompt": "<image>What is it?", "chosen": "A bus.", "rejected": "A cat.", "images": ["a.jpg"]},
    "TRL, conversational": {
        "prompt": [ASKED],
        "chosen": [{"role": "assistant", "content": "A bus."}],
        "rejected": [{"role": "assistant", "content": "A cat."}],
        "images": ["a.jpg"],
    },
    "TRL, implicit prompt": {
        "chosen": NATIVE["messages"],
        "rejected": [ASKED, {"role": "assistant", "content": "A cat."}],
        "images": ["a.jpg"],
    },
    "RLHF-V": {"text": json.dumps(rlhf_v()), "image_path": "b.jpg", "image": {"path": "a.jpg", "bytes": None}, "ds_name": "V"},
    "RLAIF-V": rlhf_v(image="a.jpg", origin_dataset="x"),
    "RLAIF-V, path alone": rlhf_v(image_path="a.jpg"),
    "LLaVA-RLHF": LLAVA,
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "<image>What is it?"}],
        "chosen": {"from": "gpt", "value": "A bus."},
        "rejected": {"from": "gpt", "value": "A cat."},
        "images": ["a.jpg"],
    },
    "query": {"query": "<image>What is it?", "response": "A bus.", "rejected_response": "A cat.", "images": ["a.jpg"]},
    "alpaca": {"instruction": "<image>What is it?", "output": "A bus.", "rejected_response": "A cat.", "images": ["a.jpg"]},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_two_conversations(row: dict[str, Any]) -> None:
    before = json.dumps(row)
    candidates = read(row)
    assert json.dumps(row) == before
    assert [(answer.role, texts(answer.sample)) for answer in candidates.answers] == [
        ("chosen", says("A bus.")),
        ("rejected", says("A cat.")),
    ]
    assert all(answer.sample.media("image") == [Media("image", "a.jpg")] for answer in candidates.answers)
    assert candidates.margin == 0
    assert texts(parse_row(row, ORIGIN)) == says("A bus.")  # what supervised tuning reads


@pytest.mark.parametrize(
    "row",
    [{"question": "it", "answer": "A bus.", "rejected": "A cat."}, {"question": "it", "chosen": "A bus.", "rejected": "A cat."}],
)
def test_flat_rows_with_a_template(row: dict[str, Any]) -> None:
    candidates = read(row | {"image": "a.jpg"}, prompt_template="What is {question}?")
    assert [texts(answer.sample) for answer in candidates.answers] == [
        says("A bus.", "<image>What is it?"),
        says("A cat.", "<image>What is it?"),
    ]


@pytest.mark.parametrize(
    "completions", [VL, {"annotations": [x["annotations"] for x in VL], "response": [x["response"] for x in VL]}]
)
def test_ratings_of_vl_feedback(completions: Any) -> None:
    candidates = read({"id": "v", "prompt": "What is it?", "image": "a.jpg", "models": ["m"], "completions": completions})
    assert [(answer.role, answer.sample.messages[-1].text) for answer in candidates.answers] == [
        ("chosen", "A bus."),
        ("rejected", "A cat."),
        ("rejected", "A red bus."),
    ]


@pytest.mark.parametrize("key", ["rejected_response", "rejected_responses", "rejected"])
def test_several_rejected_answers_and_a_margin(key: str) -> None:
    candidates = read(NATIVE | {key: ["A cat.", "A dog."], "margin": 1.5})
    assert [answer.sample.messages[-1].text for answer in candidates.answers] == ["A bus.", "A cat.", "A dog."]
    assert candidates.margin == 1.5


def test_media_of_the_rejected_side() -> None:
    candidates = read(NATIVE | {"rejected_images": ["b.jpg"]})
    assert [answer.sample.media("image") for answer in candidates.answers] == [
        [Media("image", "a.jpg")],
        [Media("image", "b.jpg")],
    ]
    assert [texts(answer.sample) for answer in candidates.answers] == [says("A bus."), says("A bus.")]
    both = read(NATIVE | {"rejected_images": ["b.jpg"], "rejected_response": "A cat."})
    assert texts(both.answers[1].sample) == says("A cat.")
    assert both.answers[1].sample.media("image") == [Media("image", "b.jpg")]


def test_only_what_differs_is_compared() -> None:
    turns = [ASKED, {"role": "assistant", "content": "A bus."}, {"role": "user", "content": "Which colour?"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "Red."}], "images": ["a.jpg"]}
    chosen, rejected = read(row | {"rejected_response": "Blue."}).answers
    assert [message.supervised for message in chosen.sample.messages] == [False, False, False, True]
    assert [message.supervised for message in rejected.sample.messages] == [False, False, False, True]
    whole = [ASKED, {"role": "assistant", "content": "A cat."}, *turns[2:], {"role": "assistant", "content": "Grey."}]
    chosen, rejected = read(row | {"rejected_messages": whole}).answers
    assert [message.supervised for message in chosen.sample.messages] == [False, True, False, True]
    assert [message.supervised for message in rejected.sample.messages] == [False, True, False, True]


def test_identical_answers_are_no_error() -> None:
    chosen, rejected = read(NATIVE | {"rejected_response": "A bus."}).answers
    assert texts(chosen.sample) == texts(rejected.sample) == says("A bus.")


@pytest.mark.parametrize(
    "row", [NATIVE, {"prompt": "<image>What is it?", "completion": "A bus.", "images": ["a.jpg"]}], ids=["ms-swift", "TRL"]
)
def test_feedback(row: dict[str, Any]) -> None:
    for label, role in ((True, "desirable"), (False, "undesirable"), (1, "desirable"), (0, "undesirable")):
        (answer,) = read(row | {"label": label}, "feedback").answers
        assert (answer.role, texts(answer.sample)) == (role, says("A bus."))
    roles = [answer.role for answer in read(NATIVE | {"rejected": ["A cat.", "A dog."], "label": False}, "feedback").answers]
    assert roles == ["desirable", "undesirable", "undesirable"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected side": (NATIVE, "there is no rejected answer: expected one of 'rejected', 'rejected_response'"),
    "feedback for pairs": (NATIVE | {"label": True}, "unpaired feedback is for KTO"),
    "two of them": (NATIVE | {"rejected": "a", "rejected_response": "b"}, "the keys 'rejected', 'rejected_response': keep one"),
    "an empty answer": (
        NATIVE | {"rejected_response": " "},
        "the rejected answer, read in the place of the chosen one: .* is empty",
    ),
    "one of several empty": (NATIVE | {"rejected": ["a", ""]}, "rejected answer 2, .* is empty"),
    "a number": (NATIVE | {"rejected": 3}, "'rejected' must be a text, a list of messages, .* got a number"),
    "no answers": (NATIVE | {"rejected": []}, "'rejected' must be a text"),
    "a wrong role": (NATIVE | {"rejected_response": [{"role": "user", "content": "x"}]}, "rejected answer, .* has the role user"),
    "no answer at its end": (NATIVE | {"rejected_messages": [ASKED]}, "rejected answer, .*: there is no answer"),
    "too many media": (NATIVE | {"rejected_images": ["a.jpg", "b.jpg"]}, "rejected answer, .*: 1 <image> .* but 2 in 'images'"),
    "no media": (NATIVE | {"rejected_images": []}, "rejected answer, .*: 1 <image> .* but 0 in 'images'"),
    "a margin in words": (NATIVE | {"rejected": "a", "margin": "much"}, "'margin' must be a number, got a text"),
    "loss false": (
        {"messages": [ASKED, {"role": "assistant", "content": "a", "loss": False}], "images": ["a"], "rejected": "b"},
        "loss",
    ),
    "no preference": (LLAVA | {"preference": 0}, "'preference' must be 1 or 2"),
    "equal ratings": (
        {"prompt": "What?", "completions": [completion("a", 3, 3, 3), completion("b", 4, 2, 3)]},
        "the 2 'completions' have one mean rating",
    ),
    "no ratings": ({"prompt": "What?", "completions": [{"response": "a", "annotations": {}}]}, "have no ratings"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_compared(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=rf"^rows\.jsonl:7: .*{reason}"):
        read(row)


def test_feedback_without_a_label() -> None:
    with pytest.raises(RowError, match="there is neither a 'label', true or false, nor a rejected answer: got null as 'label'"):
        read(NATIVE, "feedback")
    with pytest.raises(RowError, match="got a text as 'label'"):
        read(NATIVE | {"label": "good"}, "feedback")
