import random
import re

import pytest

from datamodules.batch import IGNORE_INDEX
from datamodules.template import ConversationError
from datamodules.tokens import Codec, Cut, Encoded, Tokens, allowed_next, expand, limit_length, tokenize

PIECES = re.compile(r"<[AE]>|\n+| +|[a-z]+|.")
VOCAB: dict[str, int] = {}


def encode(text: str) -> list[int]:
    """Joins runs of newlines, of spaces and of letters."""
    return [VOCAB.setdefault(piece, len(VOCAB)) for piece in PIECES.findall(text)]


def decode(ids: list[int]) -> str:
    names = list(VOCAB)
    return "".join(names[number] for number in ids)


CODEC = Codec(encode, decode, anchor="<A>")


def test_a_text_whose_cuts_lie_between_tokens_keeps_its_ids() -> None:
    text = "user\nhi.assistant\nyo."
    assert tokenize(CODEC, text, [Cut(text.index("yo"))]) == (encode(text), [6])


def test_a_token_across_a_cut_is_split() -> None:
    text = "header\n\n\nanswer.x  y"
    ids, starts = tokenize(CODEC, text, [Cut(7), Cut(text.index(" y"))])
    assert ids == encode("header\n") + encode("\n\nanswer.x ") + encode(" y")
    assert starts == [2, 7]


@pytest.mark.parametrize("ended", [True, False])
def test_tokens_in_front_of_a_cut_are_those_of_the_prompt(ended: bool) -> None:
    draw = random.Random(0)
    for _ in range(200):
        text, cuts = "", []
        for _ in range(3):
            text += "".join(draw.choices("ab \n.", k=8))
            start = len(text)
            text += "".join(draw.choices("ab \n.", k=8))
            cuts.append(Cut(start, len(text), encode("<E>")[0]) if ended else Cut(start))
            text += "<E>"
        ids, starts = tokenize(CODEC, text, cuts)
        assert decode(ids) == text
        for number, (cut, start) in enumerate(zip(cuts, starts, strict=True)):
            assert tokenize(CODEC, text[: cut.start], cuts[:number])[0] == ids[:start]


def test_a_tokenizer_that_puts_a_space_in_front_of_every_piece_is_refused() -> None:
    def spaced(text: str) -> list[int]:
        pieces = [piece for piece in re.split("(<A>)", text) if piece]
        return [number for piece in pieces for number in encode(piece if piece == "<A>" else f" {piece}")]

    with pytest.raises(ConversationError, match="joins the end of the prompt"):
        tokenize(Codec(spaced, decode, anchor="<A>"), "header\n\nanswer", [Cut(7)])


def test_allowed_next_by_hand() -> None:
    options = [[1, 2, 9], [1, 3, 9], [1, 3, 4, 9], [5, 9]]
    assert allowed_next([1, 3, 4, 9], options) == [[1, 5], [2, 3], [4, 9], [9]]
    assert allowed_next([5, 9], options) == [[1, 5], [9]]


def test_expand_repeats_media_and_shifts_labels() -> None:
    tokens = Tokens([7, 100, 8, 101, 100, 9, 2], [range(5, 7)], None)
    assert expand(tokens, {100: [3, 1], 101: [2]}) == Encoded(
        [7, 100, 100, 100, 8, 101, 101, 100, 9, 2], [IGNORE_INDEX] * 8 + [9, 2], None, 0, {100: [1, 7], 101: [5]}
    )


def test_media_without_placeholders_leave_the_text_and_keep_their_places() -> None:
    tokens = Tokens([100, 7, 100, 101, 8, 2, 101], [range(4, 6)], None)
    assert expand(tokens, {100: [0, 0], 101: [0, 0]}) == Encoded(
        [7, 8, 2], [IGNORE_INDEX, 8, 2], None, 0, {100: [0, 1], 101: [1, 3]}
    )


ROW = Encoded([100, 100, 5, 6, 7, 8], [IGNORE_INDEX] * 3 + [6, 7, 8], [[6], [7], [8]], 0, {100: [0]})


def test_a_row_within_the_limit_is_left_alone() -> None:
    assert limit_length(ROW, 6, [100], cut=True) is ROW


def test_cut_drops_the_end_and_counts_it() -> None:
    assert limit_length(ROW, 4, [100], cut=True) == Encoded([100, 100, 5, 6], [IGNORE_INDEX] * 3 + [6], [[6]], 2, {100: [0]})


def test_a_medium_without_placeholders_is_not_cut_off() -> None:
    row = Encoded([5, 6, 7, 8], [IGNORE_INDEX, 6, 7, 8], None, 0, {100: [0, 3]})
    assert limit_length(row, 4, [100], cut=True) is row
    with pytest.raises(ConversationError, match="cut a medium"):
        limit_length(row, 3, [100], cut=True)
    before = row._replace(positions={100: [0, 2]})
    assert limit_length(before, 3, [100], cut=True).tokens == [5, 6, 7]


@pytest.mark.parametrize(
    ("max_length", "cut", "reason"),
    [
        (4, False, r"6 tokens \(of them 2 media\) are above prompt.max_length = 4; "),
        (3, True, "cut the whole answer"),
        (1, True, "cut a medium"),
    ],
)
def test_a_row_that_cannot_be_cut_is_refused(max_length: int, cut: bool, reason: str) -> None:
    with pytest.raises(ConversationError, match=reason):
        limit_length(ROW, max_length, [100], cut=cut)


def test_large_numbers_are_grouped() -> None:
    with pytest.raises(ConversationError, match=r"1,234 tokens \(of them 256 media\) are above prompt.max_length = 1,024"):
        limit_length(Encoded([100] * 256 + [5] * 978, [5] * 1234, None, 0, {100: [0]}), 1024, [100], cut=False)
