"""What a row of data says, whatever form it was written in: a `Sample` of messages, texts and media."""

from dataclasses import dataclass, field
from typing import Any

from datamodules.batch import MODALITIES, Modality, Origin, RowError
from datamodules.content import Content, Media, Piece, Text, is_blank, read_content, read_media, refuse_unread_media
from datamodules.dialects import Dialect, Role, Turn, recognise
from datamodules.preference_forms import common_form
from datamodules.prompt_template import PromptTemplate
from datamodules.rows import MEDIA_KEYS, Row, UnusableRowError, keys_of, kind_of

__all__ = ["Content", "Media", "Message", "Role", "Sample", "Text", "parse_row"]

_MAY_FOLLOW: dict[Role | None, tuple[Role, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),  # several calls of one turn have several results
}
_MAY_HOLD_MEDIA: tuple[Role, ...] = ("user", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: Who speaks.
        content: Texts and media, in order; no two texts follow each other.
        supervised: Whether a model is trained to say it.
    """

    role: Role
    content: tuple[Content, ...]
    supervised: bool = False

    @property
    def text(self) -> str:
        """The texts in order, media written as `<image>`, `<video>` and `<audio>`."""
        return "".join(piece.text if isinstance(piece, Text) else f"<{piece.modality}>" for piece in self.content)


@dataclass(frozen=True)
class Sample:
    """One row, in the one form that the rest of the data side reads.

    Args:
        origin: Where the row stands.
        id: The row's `id`, or its line number.
        messages: The conversation.
        choices: The answers among which the last one is chosen; empty: an open answer.
        columns: What else the row has, by its own keys.
    """

    origin: Origin
    id: str
    messages: tuple[Message, ...]
    choices: tuple[str, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)

    def media(self, modality: Modality) -> list[Media]:
        """The media of one modality, in the order in which they stand in the messages."""
        pieces = (piece for message in self.messages for piece in message.content)
        return [piece for piece in pieces if isinstance(piece, Media) and piece.modality == modality]


def parse_row(
    row: Row,
    origin: Origin,
    prompt_template: str | None = None,
    answer_column: str = "answer",
    require_answer: bool = True,
) -> Sample:
    """Reads a row of any known form: messages, conversations, query and response, Alpaca, preferences, or flat columns.

    Of a preference row the chosen side is the conversation; both sides stay among the columns.

    Args:
        row: The JSON object.
        origin: Where it stands, for errors.
        prompt_template: Makes the user's text of a row without messages; see `PromptTemplate`.
        answer_column: Column with the answer of such a row.
        require_answer: Refuse a row that does not end with an answer to be trained on. Otherwise it may end with the
            user; an answer that is there is kept, a blank one counts as none.

    Raises:
        RowError: The row cannot be used.
        ValueError: The prompt template is malformed.
    """
    template = None if prompt_template is None else PromptTemplate(prompt_template)
    try:
        row = common_form(row, template is not None)
        dialect = recognise(row, template, answer_column)
        read = dialect.consumed.union(MEDIA_KEYS, ("id", "choices"))
        columns = {key: value for key, value in row.items() if key not in read}
        refuse_unread_media(columns)
        messages = _read_messages(row, dialect, require_answer)
        choices = _read_choices(row, messages)
        row_id = row.get("id")
        if isinstance(row_id, bool) or not isinstance(row_id, str | int | None):
            raise UnusableRowError(f"'id' must be a text or a whole number, got {kind_of(row_id)}")
    except UnusableRowError as error:
        raise RowError(origin, str(error)) from error
    return Sample(origin, str(origin.line if row_id is None else row_id), messages, choices, columns)


def _read_messages(row: Row, dialect: Dialect, require_answer: bool) -> tuple[Message, ...]:
    turns = dialect.read(row)
    contents = [read_content(turn.content, turn.where) for turn in turns]
    if not require_answer and turns[-1].role == "assistant" and is_blank(contents[-1]):
        turns, contents = turns[:-1], contents[:-1]
    _check_turns(turns, contents)
    listed = {modality: read_media(row, modality) for modality in MODALITIES}
    _place_implied_media(turns, contents, listed, dialect)
    filled = _fill_placeholders(contents, listed)
    messages = tuple(
        Message(turn.role, content, supervised=turn.role == "assistant" and turn.loss is not False)
        for turn, content in zip(turns, filled, strict=True)
    )
    for turn, message in zip(turns, messages, strict=True):
        if message.role != "system" and is_blank(message.content):
            raise UnusableRowError(
                f"{turn.where}: the {'answer' if message.role == 'assistant' else f'{message.role} message'} is empty"
            )
    if require_answer and messages[-1].role != "assistant":
        raise UnusableRowError(f"there is no answer to train on: expected {dialect.answer}, but the row has {keys_of(row)}")
    if require_answer and not any(message.supervised for message in messages):
        raise UnusableRowError('there is no answer to train on: every assistant message has "loss": false')
    return messages


def _check_turns(turns: list[Turn], contents: list[list[Piece]]) -> None:
    previous: Role | None = None
    for turn, content in zip(turns, contents, strict=True):
        expected = _MAY_FOLLOW[previous]
        if turn.role not in expected:
            place = "the first message" if previous is None else f"a message after the role {previous}"
            raise UnusableRowError(
                f"{turn.where} has the role {turn.role}, but {place} must have the role {' or '.join(expected)}"
            )
        if turn.role != "assistant" and turn.loss:
            raise UnusableRowError(
                f'{turn.where} has "loss": true, but only assistant messages are trained on, this one is {turn.role}'
            )
        if turn.role not in _MAY_HOLD_MEDIA and any(not isinstance(piece, Text) for piece in content):
            raise UnusableRowError(
                f"{turn.where} has the role {turn.role} and holds media: only user and tool messages can hold media"
            )
        previous = turn.role
    if all(turn.role != "user" for turn in turns):
        raise UnusableRowError("there is no user message")


def _place_implied_media(
    turns: list[Turn], contents: list[list[Piece]], listed: dict[Modality, list[Media]], dialect: Dialect
) -> None:
    """Puts placeholders before the first user text, in place, where the dialect lets them be left out."""
    media: list[Piece] = [piece for content in contents for piece in content if not isinstance(piece, Text)]
    match dialect.implied_media:
        case "only" if not media and sum(map(len, listed.values())) == 1:
            missing = [modality for modality in MODALITIES if listed[modality]]
        case "all":
            missing = [modality for modality in MODALITIES if modality not in media for _ in listed[modality]]
        case _:
            return
    first_user = next(number for number, turn in enumerate(turns) if turn.role == "user")
    contents[first_user][:0] = missing


def _fill_placeholders(contents: list[list[Piece]], listed: dict[Modality, list[Media]]) -> list[tuple[Content, ...]]:
    for modality in MODALITIES:
        num_places = sum(content.count(modality) for content in contents)
        num_media = len(listed[modality])
        if num_places != num_media:
            raise UnusableRowError(
                f"{num_places} <{modality}> in the messages, but {num_media} in '{modality}s': "
                f"write one <{modality}> for each, where it belongs in a user message"
            )
    rest = {modality: iter(listed[modality]) for modality in MODALITIES}
    return [tuple(next(rest[piece]) if isinstance(piece, str) else piece for piece in content) for content in contents]


def _read_choices(row: Row, messages: tuple[Message, ...]) -> tuple[str, ...]:
    choices = row.get("choices")
    if choices is None:
        return ()
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UnusableRowError(
            f"'choices' must be a list of texts, none of them empty, got {kind_of(choices)}: {str(choices)[:120]}"
        )
    if len(set(choices)) < len(choices):
        raise UnusableRowError(f"'choices' must differ from each other, got {choices}")
    if messages[-1].role == "assistant" and messages[-1].text not in choices:
        raise UnusableRowError(f"the answer {messages[-1].text!r} is not one of the 'choices' {choices}")
    return tuple(choices)
