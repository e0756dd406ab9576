"""The forms a row may have. Each is read to the same list of `Turn`s, from which `conversation.parse_row` makes a `Sample`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any, Literal

from datamodules.batch import MODALITIES

Row = dict[str, Any]

Role = Literal["system", "user", "assistant", "tool"]

MEDIA_KEYS = frozenset({*MODALITIES, *(f"{modality}s" for modality in MODALITIES)})
"""Keys under which a row lists its media."""

_COLUMN_NAME = re.compile(r"[^\W\d][\w -]*")


class UnusableRowError(ValueError):
    """Why a row cannot be used; `parse_row` adds file and line."""


@dataclass(frozen=True)
class Turn:
    """A message as the row has it.

    Args:
        where: Name of the turn, for errors.
        role: Who speaks.
        content: A text with placeholders, or a list of parts; not yet looked into.
        loss: Whether the row asks for a loss on it; None: the row does not say.
    """

    where: str
    role: Role
    content: Any
    loss: bool | None = None


@dataclass(frozen=True)
class PromptTemplate:
    """Makes the user's text of a flat row from its columns: "Question: {question}\\nAnswer:".

    `{name}` is a column of the row; `{{` and `}}` are braces; `<image>`, `<video>` and `<audio>` say where the media
    of the row stand (without them: before the text).

    Args:
        text: The template.

    Raises:
        ValueError: A field is not the plain name of a text column.
    """

    text: str

    def __post_init__(self) -> None:
        advice = "write {name} for a column of the row, and {{ or }} for a brace"
        try:
            fields = [field[1:] for field in Formatter().parse(self.text) if field[1] is not None]
        except ValueError as error:
            raise ValueError(f"prompt_template {self.text!r} is malformed ({error}): {advice}") from error
        for name, format_spec, conversion in fields:
            if not _COLUMN_NAME.fullmatch(name or "") or format_spec or conversion:
                raise ValueError(f"prompt_template {self.text!r} has a field that is not the plain name of a column: {advice}")
            if name in MEDIA_KEYS:
                raise ValueError(
                    f"prompt_template {self.text!r} has {{{name}}}: write <{name.rstrip('s')}> where the medium stands"
                )

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the template names."""
        return frozenset(name for _, name, _, _ in Formatter().parse(self.text) if name is not None)

    def render(self, row: Row) -> str:
        """The text for one row.

        Raises:
            UnusableRowError: A column is missing, or holds neither text nor a number.
        """
        missing = sorted(self.columns - row.keys())
        if missing:
            raise UnusableRowError(
                f"prompt_template names the column {', '.join(map(repr, missing))}, but the row has {keys_of(row)}"
            )
        return self.text.format_map({name: _cell(row, name) for name in self.columns})


@dataclass(frozen=True)
class Dialect:
    """One form of rows.

    Args:
        answer: Where such a row holds its answer, for errors.
        read: Makes the turns of a row.
        consumed: Keys that become part of the conversation.
        key: The key by which a row of this form is known; empty for flat rows, which have no key of their own.
        example: What such a row looks like, for errors.
        implied_media: Which media may lack a placeholder and then stand before the first user text: `none`, the row's
            `only` one, or `all`.
    """

    answer: str
    read: Callable[[Row], list[Turn]]
    consumed: frozenset[str]
    key: str = ""
    example: str = ""
    implied_media: Literal["none", "only", "all"] = "none"


def recognise(row: Row, template: PromptTemplate | None, answer_column: str) -> Dialect:
    """The form of a row, known by its keys. With a template, every row without messages is a flat one.

    Raises:
        UnusableRowError: The row has none of the known forms.
    """
    known = CONVERSATIONS if template is not None else CONVERSATIONS + COLUMN_FORMS
    for dialect in known:
        if row.get(dialect.key) is not None:
            return dialect
    if template is not None:
        return Dialect(
            answer=f"the column {answer_column!r}",
            read=partial(_read_flat, template=template, answer_column=answer_column),
            consumed=template.columns | {answer_column},
            implied_media="all",
        )
    forms = "; ".join(dialect.example for dialect in known)
    raise UnusableRowError(
        f"the row has {keys_of(row)}, which is none of the known forms. Expected one of: {forms}; "
        "or any columns together with a prompt_template that makes the question from them"
    )


def kind_of(value: Any) -> str:
    """The type of a JSON value, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def keys_of(row: Row) -> str:
    """The keys of a row, for errors."""
    return f"the keys {', '.join(map(repr, row))}" if row else "no keys"


def _read_messages(row: Row, key: str, role_key: str, content_key: str, roles: Mapping[str, Role]) -> list[Turn]:
    messages = row[key]
    if not isinstance(messages, list):
        raise UnusableRowError(f"{key!r} must be a list of messages, got {kind_of(messages)}")
    if not messages:
        raise UnusableRowError(f"{key!r} is an empty list: expected at least one user message")
    turns = _read_system(row)
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise UnusableRowError(f"{where} must be an object with {role_key!r} and {content_key!r}, got {kind_of(message)}")
        if role_key not in message or content_key not in message:
            raise UnusableRowError(f"{where} must have {role_key!r} and {content_key!r}, but has {keys_of(message)}")
        unread = [name for name, value in message.items() if name not in (role_key, content_key, "loss") and value is not None]
        if unread:
            raise UnusableRowError(
                f"{where} has {keys_of(dict.fromkeys(unread))}, which would have no effect: remove what is not meant"
            )
        role, loss = message[role_key], message.get("loss")
        if not isinstance(role, str) or role not in roles:
            raise UnusableRowError(f"{where} has the unknown role {role!r}: expected one of {', '.join(roles)}")
        if not isinstance(loss, bool | None):
            raise UnusableRowError(f"{where}: 'loss' must be true or false, got {kind_of(loss)}")
        turns.append(Turn(where, roles[role], message[content_key], loss))
    return turns


def _read_query(row: Row) -> list[Turn]:
    return [*_read_system(row), *_read_history(row), _turn(row, "query", "user"), *_read_answer(row, "response")]


def _read_alpaca(row: Row) -> list[Turn]:
    parts = [_text(row, key) for key in ("instruction", "input") if row.get(key) is not None]
    question = "\n".join(part for part in parts if part.strip())
    asked = Turn("'instruction'", "user", question)
    return [*_read_system(row), *_read_history(row), asked, *_read_answer(row, "output")]


def _read_flat(row: Row, template: PromptTemplate, answer_column: str) -> list[Turn]:
    question = Turn("the prompt", "user", template.render(row))
    if row.get(answer_column) is None:
        return [question]
    return [question, Turn(f"the column {answer_column!r}", "assistant", _cell(row, answer_column))]


def _read_system(row: Row) -> list[Turn]:
    return [_turn(row, "system", "system")] if row.get("system") not in (None, "") else []


def _read_answer(row: Row, key: str) -> list[Turn]:
    return [_turn(row, key, "assistant")] if row.get(key) is not None else []


def _read_history(row: Row) -> list[Turn]:
    pairs = row.get("history") or []
    if not isinstance(pairs, list):
        raise UnusableRowError(f"'history' must be a list of [question, answer] pairs, got {kind_of(pairs)}")
    turns = []
    for number, pair in enumerate(pairs, 1):
        where = f"pair {number} of 'history'"
        match pair:
            case [str(question), str(answer)]:
                turns.append(Turn(where, "user", question))
                turns.append(Turn(where, "assistant", answer))
            case _:
                raise UnusableRowError(f"{where} must be [question, answer], two texts, got {str(pair)[:60]}")
    return turns


def _turn(row: Row, key: str, role: Role) -> Turn:
    return Turn(repr(key), role, _text(row, key))


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str):
        raise UnusableRowError(f"{key!r} must be a text, got {kind_of(row[key])}")
    return row[key]


def _cell(row: Row, column: str) -> str:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnusableRowError(f"the column {column!r} must hold a text or a number, got {kind_of(value)}")
    return str(value)


_NATIVE_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

CONVERSATIONS = (
    Dialect(
        key="messages",
        example='{"messages": [{"role": "user", "content": "<image>…"}, {"role": "assistant", "content": …}], "images": […]}',
        answer="a last message of the role assistant",
        read=partial(_read_messages, key="messages", role_key="role", content_key="content", roles=_NATIVE_ROLES),
        consumed=frozenset({"messages", "system"}),
    ),
    Dialect(
        key="conversations",
        example='{"conversations": [{"from": "human", "value": "<image>…"}, {"from": "gpt", "value": …}], "image": …}',
        answer="a last turn from gpt",
        read=partial(_read_messages, key="conversations", role_key="from", content_key="value", roles=_SHAREGPT_ROLES),
        consumed=frozenset({"conversations", "system"}),
        implied_media="only",
    ),
)
"""Forms with a list of messages; they go before a prompt template."""

COLUMN_FORMS = (
    Dialect(
        key="query",
        example='{"query": …, "response": …}, and if need be "history" and "system"',
        answer="the key 'response'",
        read=_read_query,
        consumed=frozenset({"query", "response", "history", "system"}),
    ),
    Dialect(
        key="instruction",
        example='{"instruction": …, "input": …, "output": …}, and if need be "history" and "system"',
        answer="the key 'output'",
        read=_read_alpaca,
        consumed=frozenset({"instruction", "input", "output", "history", "system"}),
    ),
)
"""Forms with one column for each part of the conversation; a prompt template goes before them."""
