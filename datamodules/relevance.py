"""Whether an answer takes up its question, by the words of both."""

import re
from collections.abc import Sequence

from datamodules.scorers import Response, Scorer
from datamodules.words import words_of


class RelevanceScorer(Scorer):
    """How much of the question an answer takes up: the share of the question's content words (those that are no stop words) that
    stand in the answer, times the share of the answer's word trigrams that are not copied from the question.

    0.5 is an answer in its own words with half of what was asked about; an echo of the question is 0, and so is an answer
    without words. It says nothing (None) about answers of fewer than `min_words` words, which need not repeat anything ("red"),
    about questions without content words, and about text that is written without spaces. Words are compared in any case,
    without a plural s. It does not know synonyms: `EmbeddingRelevanceScorer` does.

    Args:
        min_words: From how many words on an answer is expected to take up the question; at least 3.
    """

    name = "relevance"

    def __init__(self, min_words: int = 4) -> None:
        if min_words < 3:
            raise ValueError(f"RelevanceScorer.min_words is a number of words, at least 3 (a trigram), got {min_words}")
        self.min_words = min_words

    def __call__(self, responses: Sequence[Response]) -> list[float | None]:
        """The score of each answer."""
        return [self._score(response) for response in responses]

    def _score(self, response: Response) -> float | None:
        asked, answer = ([_singular(word) for word in words_of(text)] for text in (response.prompt, response.response))
        content = {word for word in asked if word not in _STOP_WORDS}
        if not content or _UNSPACED.search(response.prompt + response.response):
            return None
        if not answer:
            return 0.0
        if len(answer) < self.min_words:
            return None
        copied = set(_trigrams(asked))
        is_new = [trigram not in copied for trigram in _trigrams(answer)]
        return len(content & set(answer)) / len(content) * sum(is_new) / len(is_new)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _trigrams(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + 3]) for start in range(len(words) - 2)]


_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese."""

_STOP_TEXT = """
    a about an and any are as at be been by can could did do doe does for from had has have he her here him his how i if in into
    is it its many me much my of on or our please she should so some tell that the their them there these they thi this those to u
    up us was we were what when where which who whom whose why will with would you your
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())
