"""Chat templates read backwards: where each message stands in the rendered text, and where each answer starts.

A template is a program, so it is run and not parsed: rendered once with a marker in the place of every message, it shows
the literal pieces between the messages; rendered with the true messages, it must give the same pieces around them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

Chat = Sequence[tuple[str, str]]
"""Role and text of each message."""

Render = Callable[[Chat, bool], str]
"""Writes a chat as text; the flag adds the header that asks for an answer (`add_generation_prompt`)."""

MARKER = re.compile(r"OmniLitMessage(\d+)Text")

FORMS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: text.lstrip("\n"),
    lambda text: text.strip("\n"),
    str.strip,
    str.rstrip,
    str.lstrip,
)
"""What templates do to the whitespace around a message."""


class ConversationError(ValueError):
    """A conversation that cannot be written as tokens in the way it is meant; the text is the reason."""


@dataclass(frozen=True)
class Slot:
    """The place of one message in the rendered text.

    Args:
        message: Its number in the chat.
        before: Literal text between the message in front and this one; for an answer it ends where generation starts.
        prefill: What the template itself writes at the start of an answer (a space, an empty think block). The model has
            to generate it, so it belongs to what is learnt.
        promptable: Whether a prompt for this message is the text in front of it.
    """

    message: int
    before: str
    prefill: str = ""
    promptable: bool = False


@dataclass(frozen=True)
class Skeleton:
    """The literal pieces around the messages; `open_end`: more may follow the tail (a prompt's forced first words)."""

    slots: tuple[Slot, ...]
    tail: str
    open_end: bool = False


@dataclass(frozen=True)
class Answer:
    """An answer in the written text, in characters.

    Args:
        message: Its number in the chat.
        start: Where generation starts.
        content: Where the message's own text starts and ends.
        after: Literal text that follows.
    """

    message: int
    start: int
    content: tuple[int, int]
    after: str


@dataclass(frozen=True)
class Written:
    """A chat as the template writes it, and the answers that a prompt can lead to."""

    text: str
    answers: tuple[Answer, ...]


class ChatTemplate:
    """Writes chats through a template and says where the answers stand.

    The pieces found are kept by the chat's roles. A template that looks at what the messages say is still written
    rightly or refused, never misread, because each chat is compared with its direct rendering.

    Args:
        render: The template.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._skeletons: dict[tuple[tuple[str, ...], bool], Skeleton] = {}

    def write(self, chat: Chat) -> Written:
        """The whole chat.

        Raises:
            ConversationError: The template refuses the chat or rewrites its messages.
        """
        return self._write(chat, generate=False)

    def prompt(self, chat: Chat) -> Written:
        """The chat up to where an answer to it starts; equal to the start of `write` for the chat and any answer.

        Some templates force the first words of a prompted answer (an empty think block) but leave them out when they
        write a given answer. The prompt then ends with the header that both have in common.

        Raises:
            ConversationError: As `write`, or the template asks for an answer in other words than it writes one.
        """
        return self._write(chat, generate=True)

    def _write(self, chat: Chat, generate: bool) -> Written:
        key = (tuple(role for role, _ in chat), generate)
        for _ in range(2):
            rendered = self._render(chat, generate)
            if key not in self._skeletons:
                self._skeletons[key] = prompt_skeleton(self._render, key[0]) if generate else build_skeleton(self._render, key[0])
            written = match(self._skeletons[key], [text for _, text in chat], rendered)
            if written is not None:
                return written
            del self._skeletons[key]  # a template may write the date, and days end: look once more
        raise ConversationError(
            "the chat template rewrites the messages (some drop earlier reasoning, or change words), so it cannot be told which "
            "tokens are the answer's; write the row as the template gives it back, or set prompt.chat_template to another one"
        )


def build_skeleton(render: Render, roles: Sequence[str]) -> Skeleton:
    """Finds the literal pieces that a template writes around messages of these roles.

    Raises:
        ConversationError: The template refuses the roles, or leaves out or repeats a message.
        ValueError: The template has no generation prompt.
    """
    chat = [(role, f"OmniLitMessage{number}Text") for number, role in enumerate(roles)]
    text = render(chat, False)
    *pieces, tail = MARKER.split(text)
    literals, numbers = pieces[::2], [int(number) for number in pieces[1::2]]
    for number, role in enumerate(roles):
        if numbers.count(number) != 1:
            raise ConversationError(
                f"the chat template writes message {number + 1} (role {role}) {numbers.count(number)} times, expected once; "
                "remove the message, or set prompt.chat_template to a template that takes it"
            )
    slots, position = [], 0
    for literal, number in zip(literals, numbers, strict=True):
        start = None
        if roles[number] == "assistant" and number > 0:  # templates cannot write an empty chat
            start = _generation_start(render, chat[:number], text, position, position + len(literal))
        slots.append(
            Slot(number, literal)
            if start is None
            else Slot(number, literal[: start - position], literal[start - position :], promptable=True)
        )
        position += len(literal) + len(chat[number][1])
    return Skeleton(tuple(slots), tail)


def _generation_start(render: Render, chat: Chat, text: str, begin: int, content: int) -> int | None:
    """Where in `text[begin:content]`, the piece in front of an answer, the prompt for it ends; None: it does not end there."""
    prompt = render(chat, True)
    common = len(commonprefix([prompt, text]))
    rest = text[common:content]
    if common < begin or (common < len(prompt) and rest.strip()):
        return None
    if rest.strip() and prompt == render(chat, False):
        raise ValueError(
            f"the chat template has no generation prompt: the model would have to write {rest!r} itself before each answer; "
            "add {% if add_generation_prompt %} to it, or set prompt.chat_template to another one"
        )
    return min(common, content)  # forced first words may happen to start like the marker


def prompt_skeleton(render: Render, roles: Sequence[str]) -> Skeleton:
    """The pieces of a chat of these roles up to where the next answer starts.

    Raises:
        ConversationError: The prompt for an answer is not the start of the chat with that answer.
    """
    *slots, answer = build_skeleton(render, [*roles, "assistant"]).slots
    if answer.message != len(roles) or not answer.promptable:
        raise ConversationError(not_promptable(len(roles)))
    return Skeleton(tuple(slots), answer.before, open_end=True)


def not_promptable(message: int) -> str:
    """The reason why an answer cannot be learnt or asked for."""
    return (
        f"asked for message {message + 1}, the chat template writes the messages in front of it otherwise than when the answer "
        "is there, so what is learnt would not be what is asked; leave that message out of the loss, start the chat with "
        "a user message, or set prompt.chat_template to another one"
    )


def match(skeleton: Skeleton, texts: Sequence[str], rendered: str) -> Written | None:
    """Finds the messages in the rendered text; None if the text is not the skeleton filled with them."""
    slots = skeleton.slots
    if not rendered.startswith(slots[0].before):
        return None
    position, answers = 0, []
    for slot, following in zip(slots, [*(slot.before for slot in slots[1:]), skeleton.tail], strict=True):
        position += len(slot.before)
        exact = slot is slots[-1] and not skeleton.open_end
        for prefill, form in ((prefill, form) for prefill in dict.fromkeys((slot.prefill, "")) for form in FORMS):
            candidate = prefill + form(texts[slot.message])
            end = position + len(candidate)
            if rendered.startswith(candidate + following, position) and not (exact and end + len(following) != len(rendered)):
                break
        else:
            return None
        if slot.promptable:
            answers.append(Answer(slot.message, position, (position + len(prefill), end), following))
        position = end
    return Written(rendered[: position + len(skeleton.tail)], tuple(answers))


def plain_template(bos: bool) -> str:
    """A template for base models, which have none: `User: …`, `Assistant: …` and the end of text after each answer.

    Args:
        bos: Start with the tokenizer's beginning-of-text token.
    """
    return (
        ("{{ bos_token }}" if bos else "")
        + "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
        + "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
        + "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
