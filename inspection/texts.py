"""What a row says, as far as it is compared with what others say."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from datamodules.conversation import Sample, Text
from datamodules.rows import MEDIA_KEYS

_REJECTED = ("rejected", "rejected_response")
"""Columns with another answer, in rows that compare two; an objective that takes one answer leaves them where they are."""

_REJECTED_MEDIA = frozenset(f"rejected_{key}" for key in MEDIA_KEYS)


@dataclass(frozen=True, slots=True)
class RowText:
    """What a row says.

    Args:
        digest: The same for two rows with the same words by the same speakers, white space and capitals aside.
        answer: The answer, where it is one of a few choices.
        place: Its place among them, from 0.
        num_choices: How many there are; 0: the answer is open.
        has_same_sides: Whether the answers that are compared are the same, with the same media.
    """

    digest: bytes
    answer: str = ""
    place: int = 0
    num_choices: int = 0
    has_same_sides: bool = False


def read_text(samples: Sequence[Sample]) -> RowText:
    """What a row says.

    Args:
        samples: Its conversations: one, or that of each answer that is compared, the chosen one first.
    """
    first, answer = samples[0], answer_of(samples[0])
    turns = [(message.role, plain(message.text)) for sample in samples for message in sample.messages]
    digest = digest_of(word for turn in turns for word in turn)
    if len(samples) > 1:
        same = any(sample.messages == first.messages for sample in samples[1:])
    else:
        others = [plain(text) for key in _REJECTED if isinstance(text := first.columns.get(key), str)]
        same = plain(answer) in others and not first.columns.keys() & _REJECTED_MEDIA
    if answer not in first.choices:
        return RowText(digest, has_same_sides=same)
    return RowText(digest, answer, first.choices.index(answer), len(first.choices), same)


def answer_of(sample: Sample) -> str:
    """The last answer; empty: there is none."""
    last = sample.messages[-1]
    return last.text if last.role == "assistant" else ""


def question_and_answer(sample: Sample) -> str:
    """The last thing that the user says and the answer to it, without the places of media."""
    asked = [message for message in sample.messages if message.role == "user"]
    texts = [piece.text for message in asked[-1:] for piece in message.content if isinstance(piece, Text)]
    return " ".join([*texts, answer_of(sample)]).strip()


def plain(text: str) -> str:
    """A text without its capitals, and with single spaces."""
    return " ".join(text.casefold().split())


def digest_of(words: Iterable[str]) -> bytes:
    """16 bytes that stand for a list of texts."""
    digest = hashlib.blake2b(digest_size=16)
    for word in words:
        data = word.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()
