"""The answers of a row that an objective compares: each as a conversation of its own, whatever form the row has."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from datamodules.batch import MODALITIES, AnswerRole, Origin, RowError
from datamodules.conversation import Message, Sample, parse_row
from datamodules.dialects import CONVERSATIONS, Dialect, recognise
from datamodules.preference_forms import common_form
from datamodules.prompt_template import PromptTemplate
from datamodules.rows import MEDIA_KEYS, Row, UnusableRowError, keys_of, kind_of

_REJECTED = ("rejected", "rejected_response", "rejected_responses", "rejected_messages")
_REJECTED_MEDIA = tuple(f"rejected_{key}" for key in MEDIA_KEYS)
_CONTENT = {"messages": "content", "conversations": "value"}


@dataclass(frozen=True)
class Candidate:
    """One answer, at the end of its conversation.

    Args:
        role: What it is to the objective.
        sample: The conversation; supervised is what the objective compares.
        name: What errors call it.
        scores: What reward criteria say of it, by their names; None: nothing.
        weight: Of a rejected answer, the weight of its pair.
        margin: Of a rejected answer, by how much the chosen one is better; None: as the row says.
    """

    role: AnswerRole
    sample: Sample
    name: str
    scores: Mapping[str, float | None] = field(default_factory=dict)
    weight: float = 1.0
    margin: float | None = None


@dataclass(frozen=True)
class Candidates:
    """The answers of a row.

    Args:
        answers: The chosen one comes first.
        margin: By how much the chosen one is better, in units of reward; 0 where the row does not say.
        change: What reward criteria changed in them, and why; empty: nothing.
    """

    answers: tuple[Candidate, ...]
    margin: float = 0.0
    change: str = ""

    @property
    def sample(self) -> Sample:
        """The conversation of the row."""
        return self.answers[0].sample


def parse_answers(
    row: Row,
    origin: Origin,
    kind: Literal["pairs", "feedback"],
    prompt_template: str | None = None,
    answer_column: str = "answer",
) -> Candidates:
    """Reads the answers of a preference row, or the one answer of a row with unpaired feedback.

    The conversation of the row ends with the chosen answer; rows of the form `chosen` have it there. Against it stand:

    - `rejected_response` or `rejected`: a text, the messages that stand in the place of the answer, or a list of several such;
      `rejected_responses`: the same;
    - `rejected_messages`: a whole conversation;
    - `rejected_images` (videos, audios): the media of the rejected side, where they are others, with or without another answer.

    Unpaired feedback is a `label`, true or false, beside the conversation, or beside `prompt` and `completion`. Compared are the
    answers from the first message on in which the sides differ, at least the last one. Identical answers are no error.

    Args:
        row: The JSON object.
        origin: Where it stands, for errors.
        kind: `pairs`: the row needs a rejected side. `feedback`: that or a label; of a pair the chosen answer is
            desirable, the others are not.
        prompt_template: Makes the user's text of a row without messages.
        answer_column: Column with the chosen answer of such a row.

    Raises:
        RowError: The row cannot be used.
    """
    sample = parse_row(row, origin, prompt_template, answer_column)
    try:
        row = common_form(row, prompt_template is not None)
        dialect = recognise(row, None if prompt_template is None else PromptTemplate(prompt_template), answer_column)
        others = _rejected_rows(row, dialect)
        margin = _margin(row)
        is_desirable = _label(row, kind) if not others else True
    except UnusableRowError as error:
        raise RowError(origin, str(error)) from error
    sides = [replace(sample, choices=())]
    names = ["the chosen answer" if others else "the answer"]
    for number, other in enumerate(others, 1):
        names.append("the rejected answer" if len(others) == 1 else f"rejected answer {number}")
        try:
            sides.append(parse_row(other, origin, prompt_template, answer_column))
        except RowError as error:
            raise RowError(origin, f"{names[-1]}, read in the place of the chosen one: {error.reason}") from error
    first = min((_common(sides[0], side) for side in sides[1:]), default=None)
    if first is None:
        first = _last(sample) if dialect in CONVERSATIONS else 0
    roles: tuple[AnswerRole, AnswerRole] = ("chosen", "rejected") if kind == "pairs" else ("desirable", "undesirable")
    answers = [
        Candidate(roles[0 if number == 0 and is_desirable else 1], _compared(side, first, name), name)
        for number, (side, name) in enumerate(zip(sides, names, strict=True))
    ]
    return Candidates(tuple(answers), margin)


def _rejected_rows(row: Row, dialect: Dialect) -> list[Row]:
    """For each rejected answer a row that has it in the place of the chosen one."""
    keys = [key for key in _REJECTED if row.get(key) is not None]
    media = {key.removeprefix("rejected_"): row[key] for key in _REJECTED_MEDIA if row.get(key) is not None}
    if len(keys) > 1:
        raise UnusableRowError(f"the row has {keys_of(dict.fromkeys(keys))}: keep one of them")
    if not keys and not media:
        return []
    left_out = {*_REJECTED, *_REJECTED_MEDIA, "choices"}
    for modality in MODALITIES:
        if modality in media or f"{modality}s" in media:
            left_out |= {modality, f"{modality}s"}
    base = {key: value for key, value in row.items() if key not in left_out} | media
    if not keys:
        return [base]
    if keys[0] == "rejected_messages" and not dialect.answer_key:
        return [base | {dialect.key: row[keys[0]]}]
    return [_with_answer(base, dialect, answer, keys[0]) for answer in _several(row[keys[0]], keys[0])]


def _several(value: Any, key: str) -> list[Any]:
    """Rejected answers, each a text or a list of messages."""
    match value:
        case str():
            return [value]
        case [dict(), *_]:
            return [value]
        case [_, *_] if all(isinstance(item, str | list) for item in value):
            return value
    raise UnusableRowError(
        f"{key!r} must be a text, a list of messages, or a list of several rejected answers, got {kind_of(value)}: "
        f"{str(value)[:60]!r}"
    )


def _with_answer(row: Row, dialect: Dialect, answer: Any, key: str) -> Row:
    if dialect.answer_key:
        return row | {dialect.answer_key: answer}
    turns: list[Any] = row[dialect.key]
    if isinstance(answer, str):
        return row | {dialect.key: [*turns[:-1], {**turns[-1], _CONTENT[dialect.key]: answer}]}
    role = "role" if dialect.key == "messages" else "from"
    start = max(number for number, turn in enumerate(turns) if turn[role] in ("user", "human")) + 1
    return row | {dialect.key: [*turns[:start], *answer]}


def _label(row: Row, kind: Literal["pairs", "feedback"]) -> bool:
    label = row.get("label")
    if kind == "pairs":
        expected = ", ".join(map(repr, (*_REJECTED, "rejected_images")))
        hint = "; unpaired feedback is for KTO" if label is not None else ""
        raise UnusableRowError(f"there is no rejected answer: expected one of {expected}, but the row has {keys_of(row)}{hint}")
    if not isinstance(label, bool) and label not in (0, 1):
        raise UnusableRowError(
            f"there is neither a 'label', true or false, nor a rejected answer: got {kind_of(label)} as 'label', and "
            f"{keys_of(row)}"
        )
    return bool(label)


def _margin(row: Row) -> float:
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float | None):
        raise UnusableRowError(f"'margin' must be a number, got {kind_of(margin)}: {str(margin)[:60]!r}")
    return float(margin or 0.0)


def _common(one: Sample, other: Sample) -> int:
    """How many messages the two begin with in common; where all are, without the last answer."""
    pairs = zip(one.messages, other.messages, strict=False)
    same = [(a.role, a.text) == (b.role, b.text) for a, b in pairs]
    return min(same.index(False) if False in same else len(same), _last(one), _last(other))


def _last(sample: Sample) -> int:
    return len(sample.messages) - 1


def _compared(sample: Sample, first: int, name: str) -> Sample:
    """The sample with nothing supervised before the first message that is compared."""
    messages: list[Message] = [
        replace(message, supervised=message.supervised and number >= first) for number, message in enumerate(sample.messages)
    ]
    if not any(message.supervised for message in messages):
        raise RowError(sample.origin, f'{name} has "loss": false, so that there is nothing to compare')
    return replace(sample, messages=tuple(messages))
