"""Relevance by words, on texts whose words can be counted on paper."""

import pytest

from datamodules.relevance import RelevanceScorer
from datamodules.scorers import Response

QUESTION = "What colours do the buses in this street have?"  # colour, buse, street


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("One colour is red and all buses are in one street.", 1.0),
        ("The colour of both is a dark red.", 1 / 3),
        ("Nobody has been here for many years.", 0.0),
        (QUESTION, 0.0),  # an echo
        ("", 0.0),
        ("...", 0.0),
        ("red", None),  # need not repeat anything
        ("They are red.", None),
        # "the buses in", "buses in this" and "in this street" are copied, of 7 trigrams
        ("All of the buses in this street are red.", 2 / 3 * 4 / 7),
        ("buses buses buses buses buses", 1 / 3),  # a word counts once
    ],
)
def test_content_words_and_copied_trigrams(answer: str, expected: float | None) -> None:
    (found,) = RelevanceScorer()([Response(QUESTION, answer)])
    assert found == (None if expected is None else pytest.approx(expected))


def test_it_says_nothing_about_what_it_cannot_read() -> None:
    scorer = RelevanceScorer()
    assert scorer([Response("", "It is a red bus."), Response("What is this?", "It is a red bus.")]) == [None, None]
    assert scorer([Response("图片里有什么", "一辆红色的公共汽车停在房子前面。")]) == [None]
    assert scorer([Response("BUS?", "A red bus there.")]) == [1.0]


def test_the_number_of_words_is_checked() -> None:
    with pytest.raises(ValueError, match="min_words is a number of words, at least 3"):
        RelevanceScorer(min_words=2)
    assert RelevanceScorer(min_words=3)([Response(QUESTION, "A red street.")]) == [pytest.approx(1 / 3)]
