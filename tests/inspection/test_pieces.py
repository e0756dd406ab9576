"""A row of a batch reads as it was written: each stretch of tokens with its loss, each medium with its number of tokens."""

from dataclasses import replace

import pytest
import torch

from datamodules.answer_rows import AnswerExample
from datamodules.batch import IGNORE_INDEX, Example, MediaItem, Origin
from datamodules.collate import collate
from inspection.pieces import Piece, stretches, visible
from tests.tiny import make_tokenizer

MEDIA_IDS = {900, 901, 902}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, "chatml")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def example(tokenizer) -> Example:
    """Two pictures side by side, a question, an answer with its end."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    question, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("What is it?", "A red bus."))
    tokens = [900] * 5 + question + [end, *answer, end]
    labels = [IGNORE_INDEX] * (6 + len(question)) + [*answer, end]
    items = [MediaItem("a", torch.zeros(1), 2, 0), MediaItem("b", torch.ones(1), 3, 2)]
    return Example(Origin("f", 1), "1", tokens, labels, {"image": items})


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_with_media_and_padding(example, tokenizer, side):
    longer = Example(Origin("f", 2), "2", [5] * 60, [IGNORE_INDEX] * 60)
    batch = collate([example, longer], pad_id=0, side=side)
    (stretch,) = stretches(batch, 0, tokenizer, MEDIA_IDS)
    num_question = len(tokenizer("What is it?", add_special_tokens=False).input_ids)
    num_answer = len(tokenizer("A red bus.", add_special_tokens=False).input_ids)
    assert stretch.pieces == (
        Piece("medium", "image", 2, False),
        Piece("medium", "image", 3, False),
        Piece("text", "What is it?", num_question, False),
        Piece("special", "<|im_end|>", 1, False),
        Piece("text", "A red bus.", num_answer, True),
        Piece("special", "<|im_end|>", 1, True),
    )
    assert stretch.num_tokens == len(example.tokens)
    assert stretch.num_supervised == num_answer + 1


def test_text_that_is_supervised_in_the_middle_of_a_stretch(tokenizer):
    ids = tokenizer("one red bus waits", add_special_tokens=False).input_ids
    labels = [IGNORE_INDEX, *ids[1:2], *[IGNORE_INDEX] * (len(ids) - 2)]
    (stretch,) = stretches(collate([Example(Origin("f", 1), "1", ids, labels)], pad_id=0), 0, tokenizer, MEDIA_IDS)
    assert [piece.supervised for piece in stretch.pieces] == [False, True, False]
    assert "".join(piece.text for piece in stretch.pieces) == "one red bus waits"


def test_answers_are_stretches_of_their_own(example, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = tokenizer("It is a blue boat.", add_special_tokens=False).input_ids
    start = next(place for place, label in enumerate(example.labels) if label != IGNORE_INDEX)
    rejected = replace(
        example,
        tokens=[*example.tokens[:start], *other, end],
        labels=[*example.labels[:start], *other, end],
    )
    batch = collate([AnswerExample(**vars(example), others=[("rejected", rejected)])], pad_id=0)
    prompt, chosen, refused = stretches(batch, 0, tokenizer, MEDIA_IDS)
    assert [stretch.role for stretch in (prompt, chosen, refused)] == ["", "chosen", "rejected"]
    assert prompt.num_supervised == 0 and prompt.pieces[0].kind == "medium"
    assert [piece.text for piece in chosen.pieces if piece.supervised] == ["A red bus.", "<|im_end|>"]
    assert [piece.text for piece in refused.pieces if piece.supervised] == ["It is a blue boat.", "<|im_end|>"]


def test_a_medium_with_other_tokens_among_its_own(tokenizer):
    """As Qwen3-VL's clips have, between whose frames stand their times."""
    text = tokenizer("wait", add_special_tokens=False).input_ids
    tokens = [*text, 901, 901, *text, 901, 900, *text]
    media = {
        "video": [MediaItem("v", torch.zeros(1), 3, len(text))],
        "image": [MediaItem("i", torch.zeros(1), 1, 2 * len(text) + 3)],
    }
    example = Example(Origin("f", 1), "1", tokens, [IGNORE_INDEX] * (len(tokens) - len(text)) + text, media)
    (stretch,) = stretches(collate([example], pad_id=0), 0, tokenizer, MEDIA_IDS)
    read = [(piece.text, piece.num_tokens) for piece in stretch.pieces]
    waits = ("wait", len(text))
    assert read == [waits, ("video", 2), waits, ("video", 1), ("image", 1), waits]


def test_media_that_the_fusion_keeps_out_of_the_row_stand_in_front_of_what_follows(tokenizer):
    before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in ("one", " bus"))
    items = [MediaItem("a", torch.zeros(1), 0, len(before)), MediaItem("b", torch.ones(1), 0, len(before))]
    tokens = [*before, *after]
    example = Example(Origin("f", 1), "1", tokens, [IGNORE_INDEX, *tokens[1:]], {"image": items})
    (stretch,) = stretches(collate([example], pad_id=0), 0, tokenizer, MEDIA_IDS)
    at = [piece.kind for piece in stretch.pieces].index("medium")
    assert [piece for piece in stretch.pieces if piece.kind == "medium"] == [Piece("medium", "image", 0, False)] * 2
    assert sum(piece.num_tokens for piece in stretch.pieces[:at]) == len(before)
    assert stretch.num_tokens == len(tokens)


def test_what_a_terminal_would_obey_is_shown():
    assert visible("a\x1b[2Jb\x7f\n\tc") == "a␛[2Jb␡\n\tc"
