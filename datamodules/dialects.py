"""The forms a row may have. Each is read to the same list of `Turn`s, from which `conversation.parse_row` makes a `Sample`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from datamodules.prompt_template import PromptTemplate, read_cell
from datamodules.rows import Row, UnusableRowError, keys_of, kind_of

Role = Literal["system", "user", "assistant", "tool"]


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
class Dialect:
    """One form of rows.

    Args:
        answer: Where such a row holds its answer, for errors.
        read: Makes the turns of a row.
        consumed: Keys that become part of the conversation.
        key: The key by which a row of this form is known; empty for flat rows, which have no key of their own.
        example: What such a row looks like, for errors.
        answer_key: The key that holds the answer alone; empty for lists of messages.
        implied_media: Which media may lack a placeholder and then stand before the first user text: `none`, the row's
            `only` one, or `all`.
    """

    answer: str
    read: Callable[[Row], list[Turn]]
    consumed: frozenset[str]
    key: str = ""
    example: str = ""
    answer_key: str = ""
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
        if row.get(answer_column) is None and row.get("chosen") is not None:
            answer_column = "chosen"
        return Dialect(
            answer=f"the column {answer_column!r}",
            read=partial(_read_flat, template=template, answer_column=answer_column),
            consumed=template.columns | {answer_column, "history", "system"},
            answer_key=answer_column,
            implied_media="all",
        )
    forms = "; ".join(dialect.example for dialect in known)
    raise UnusableRowError(
        f"the row has {keys_of(row)}, which is none of the known forms. Expected one of: {forms}; "
        "or any columns together with a prompt_template that makes the question from them"
    )


def _read_conversation(row: Row, key: str, role_key: str, content_key: str, roles: Mapping[str, Role]) -> list[Turn]:
    return [*_read_system(row), *_read_messages(row, key, "", role_key, content_key, roles)]


def _read_messages(row: Row, key: str, of: str, role_key: str, content_key: str, roles: Mapping[str, Role]) -> list[Turn]:
    messages = row[key]
    if not isinstance(messages, list):
        raise UnusableRowError(f"{key!r} must be a list of messages, got {kind_of(messages)}")
    if not messages:
        raise UnusableRowError(f"{key!r} is an empty list: expected at least one message")
    turns = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}{of}"
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
    others = {key: value for key, value in row.items() if key not in template.columns | {answer_column}}
    turns = [*_read_system(others), *_read_history(others), Turn("the prompt", "user", template.render(row))]
    if row.get(answer_column) is not None:
        turns.append(Turn(f"the column {answer_column!r}", "assistant", read_cell(row, answer_column)))
    return turns


def _read_prompted(row: Row, key: str) -> list[Turn]:
    if row.get("prompt") is None and not isinstance(row[key], list):
        raise UnusableRowError(
            f"{key!r} is {kind_of(row[key])} and there is no 'prompt': give the question in 'prompt', "
            f"or the whole conversation in {key!r} as a list of messages"
        )
    prompt = _read_side(row, "prompt", "user") if row.get("prompt") is not None else []
    asked = [replace(turn, loss=bool(turn.loss)) for turn in prompt]  # earlier answers in it are given, and not preferred
    return [*_read_system(row), *_read_history(row), *asked, *_read_side(row, key, "assistant")]


def _read_side(row: Row, key: str, role: Role) -> list[Turn]:
    """A part of a row with a prompt: a text by `role`, or a list of messages."""
    if isinstance(row[key], str):
        return [_turn(row, key, role)]
    return _read_messages(row, key, f" of {key!r}", "role", "content", _NATIVE_ROLES)


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
        read=partial(_read_conversation, key="messages", role_key="role", content_key="content", roles=_NATIVE_ROLES),
        consumed=frozenset({"messages", "system"}),
    ),
    Dialect(
        key="conversations",
        example='{"conversations": [{"from": "human", "value": "<image>…"}, {"from": "gpt", "value": …}], "image": …}',
        answer="a last turn from gpt",
        read=partial(_read_conversation, key="conversations", role_key="from", content_key="value", roles=_SHAREGPT_ROLES),
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
        answer_key="response",
        consumed=frozenset({"query", "response", "history", "system"}),
    ),
    Dialect(
        key="instruction",
        example='{"instruction": …, "input": …, "output": …}, and if need be "history" and "system"',
        answer="the key 'output'",
        read=_read_alpaca,
        answer_key="output",
        consumed=frozenset({"instruction", "input", "output", "history", "system"}),
    ),
    Dialect(
        key="chosen",
        example='{"prompt": …, "chosen": …, "rejected": …}, texts or lists of messages; or whole conversations without "prompt"',
        answer="an assistant's message at the end of 'chosen'",
        read=partial(_read_prompted, key="chosen"),
        answer_key="chosen",
        consumed=frozenset({"prompt", "history", "system"}),  # both sides stay as they are, for what compares them
        implied_media="only",
    ),
    Dialect(
        key="completion",
        example='{"prompt": …, "completion": …}, texts or lists of messages, and if need be "label"',
        answer="an assistant's message at the end of 'completion'",
        read=partial(_read_prompted, key="completion"),
        answer_key="completion",
        consumed=frozenset({"prompt", "completion", "history", "system"}),
        implied_media="only",
    ),
)
"""Forms with one column for each part of the conversation; a prompt template goes before them."""
