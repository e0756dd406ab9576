"""Conversations as token ids: what is learnt of them, and what may follow in a closed set of answers."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from datamodules.batch import MODALITIES, Modality
from datamodules.template import Chat, ChatTemplate, ConversationError, Written, not_promptable, plain_template
from datamodules.tokens import Codec, Cut, Tokens, allowed_next, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEDIA_TOKENS: dict[Modality, str] = {modality: f"<|omnilit_{modality}|>" for modality in MODALITIES}
"""The special token that stands for a medium in the text, and is then repeated for each of its embeddings."""


class ChatTokenizer:
    """A tokenizer with its chat template, and a token for each modality.

    Args:
        tokenizer: A fast tokenizer with a chat template, as `load_tokenizer` gives it.
        name: What errors call it.
        media_tokens: Its own tokens for media; None: `MEDIA_TOKENS` are added behind its ids.

    Attributes:
        placeholder_ids: The tokens in whose places the embeddings of media come.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", name: str, media_tokens: Mapping[Modality, str] | None = None
    ) -> None:
        from transformers import AddedToken

        self.tokenizer = tokenizer
        self.name = name
        self.media_tokens = MEDIA_TOKENS if media_tokens is None else media_tokens
        if media_tokens is None:
            media = [AddedToken(token, special=True, normalized=False) for token in MEDIA_TOKENS.values()]
            tokenizer.add_tokens(media, special_tokens=True)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = tokenizer.added_tokens_decoder
        self._added_ids = {token.content: number for number, token in added.items()}
        self._added = _any_of(self._added_ids)
        vocabulary = tokenizer.get_vocab()
        self.media_ids = {modality: vocabulary[token] for modality, token in self.media_tokens.items()}
        self._special_ids = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self.placeholder_ids: set[int] = set(self.media_ids.values())
        self._special = _any_of(tokenizer.convert_ids_to_tokens(sorted(self._special_ids)))
        self._template = ChatTemplate(self._render)
        self._codec = Codec(self._ids, self._backend.decode, anchor=next(iter(self.media_tokens.values())))

    def check_text(self, text: str) -> None:
        """Refuses a text that would become a control token.

        Raises:
            ConversationError: It has a special token in it.
        """
        if (found := self._special.search(text)) is not None:
            raise ConversationError(
                f"the text has {found[0]!r} in it, a special token of the tokenizer, which would be read as a command and not "
                f"as text: {text[max(0, found.start() - 20) : found.end() + 20]!r}; remove it or write it otherwise"
            )

    def prompt(self, chat: Chat) -> list[int]:
        """The chat up to where the answer to it starts.

        Raises:
            ConversationError: See `ChatTemplate.prompt`.
        """
        written = self._write(chat, generate=True)
        return tokenize(self._codec, written.text, self._cuts(written))[0]

    def write(self, chat: Chat, supervised: Collection[int], choices: Sequence[str] = ()) -> Tokens:
        """The whole chat, and what is learnt of it.

        An answer is learnt from where its prompt ends up to and with its end token: the special token that the template
        writes after it. The tokens in front of it are exactly those of `prompt`.

        Args:
            chat: The conversation.
            supervised: Numbers of the messages that are learnt.
            choices: The texts among which the last answer is chosen.

        Raises:
            ConversationError: See `ChatTemplate.write`; or the template has no prompt for a supervised answer.
            ValueError: The template does not end its answers.
        """
        written = self._write(chat)
        cuts = self._cuts(written)
        ids, starts = tokenize(self._codec, written.text, cuts)
        numbers = [answer.message for answer in written.answers]
        spans = {}
        for message in sorted(supervised):
            if message not in numbers:
                raise ConversationError(not_promptable(message))
            start, cut = starts[numbers.index(message)], cuts[numbers.index(message)]
            if cut.end_id is None:
                raise ValueError(
                    f"the chat template of {self.name!r} ends answers without a special token: the model would never learn to "
                    "stop; end them with {{ eos_token }} in the template, or set prompt.chat_template to plain"
                )
            spans[message] = range(start, ids.index(cut.end_id, start) + 1)
        allowed: list[list[int]] | None = None
        if choices:
            last = max((number for number, (role, _) in enumerate(chat) if role == "assistant"), default=None)
            allowed = [[] for message, span in spans.items() if message != last for _ in span]
            if last in spans:
                begin = cuts[-2].end if len(cuts) > 1 else 0
                allowed += self._allowed(chat, written, begin, ids[spans[last].start : spans[last].stop], choices)
        return Tokens(ids, list(spans.values()), allowed)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Token ids as text: special tokens left out, the places of neighbouring media written as one `<image>`."""
        media_ids = set(self.media_ids.values())
        kept: list[int] = []
        for token in token_ids:
            if token in media_ids:
                if kept[-1:] != [token]:
                    kept.append(token)
            elif token not in self._special_ids:
                kept.append(token)
        text = self._backend.decode(kept, skip_special_tokens=False)
        for modality, name in self.media_tokens.items():
            text = text.replace(name, f"<{modality}>")
        return text

    @cached_property
    def eos_ids(self) -> list[int]:
        """The ids that end an answer: the template's ends of turn, and the tokenizer's end of text.

        Raises:
            ValueError: There is none.
        """
        ends = set() if self.tokenizer.eos_token_id is None else {self.tokenizer.eos_token_id}
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        for chat in (turns, [("system", "s"), *turns]):
            try:
                cuts = self._cuts(self._template.write(chat))
            except ConversationError:
                continue  # some templates refuse a system message, some demand one
            ends |= {cut.end_id for cut in cuts if cut.end_id is not None}
        if not ends:
            raise ValueError(
                f"tokenizer {self.name!r} has no end-of-text token and its chat template ends no answer: generation could "
                "not stop; set prompt.chat_template to a template that ends its answers with a special token"
            )
        return sorted(ends)

    def _write(self, chat: Chat, generate: bool = False) -> Written:
        return self._template.prompt(chat) if generate else self._template.write(chat)

    def _content(self, text: str) -> Any:
        """What the template takes as the content of a message."""
        return text

    def _render(self, chat: Chat, add_generation_prompt: bool) -> str:
        messages = [{"role": role, "content": self._content(text)} for role, text in chat]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template of {self.name!r} is no valid Jinja: line {error.lineno}: {error}") from error
        except jinja2.TemplateError as error:
            raise ConversationError(
                f"the chat template refuses a conversation of the roles {', '.join(role for role, _ in chat)}: {error}; "
                "change the row, or set prompt.chat_template to a template that takes it"
            ) from error
        return str(rendered)

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids  # the template has written them

    def _cuts(self, written: Written) -> list[Cut]:
        """Where the answers start, and the special token behind each."""
        cuts = []
        for answer in written.answers:
            begin, end = answer.content
            after = answer.after.lstrip()
            found = self._added.match(after)
            if found is None:
                cuts.append(Cut(answer.start))
                continue
            if found[0] in written.text[begin:end]:
                raise ConversationError(f"an answer has {found[0]!r} in it, the token that ends an answer; remove it")
            cuts.append(Cut(answer.start, end + len(answer.after) - len(after), self._added_ids[found[0]]))
        return cuts

    def _allowed(self, chat: Chat, written: Written, begin: int, ids: list[int], choices: Sequence[str]) -> list[list[int]]:
        """For each id of the last answer those with which some choice goes on; each is tokenised in the answer's place.

        Args:
            chat: The conversation.
            written: As the template writes it.
            begin: Where the end token of the answer before stands in it.
            ids: What is learnt of the last answer.
            choices: The texts.
        """
        last = written.answers[-1]
        codec = replace(self._codec, encode=cache(self._ids))  # what is in front is the same for all choices
        options = []
        for choice in choices:
            text = written.text[: last.content[0]] + choice + written.text[last.content[1] :]
            if choice != choice.strip():  # the template may strip it
                changed = [*chat[: last.message], ("assistant", choice), *chat[last.message + 1 :]]
                text = self._write(changed).text
            other, (start,) = tokenize(codec, text[begin:], [Cut(last.start - begin)])
            options.append(other[start : other.index(ids[-1], start) + 1])
        allowed = allowed_next(ids, options)
        assert all(token in options for token, options in zip(ids, allowed, strict=True)), "the answer is one of the choices"
        return allowed


def load_tokenizer(name_or_path: str, template: str | None) -> "PreTrainedTokenizerFast":
    """Reads a tokenizer and gives it a chat template.

    Args:
        name_or_path: Hub name or folder.
        template: None: its own; "plain": `plain_template`; or the path of a Jinja file.

    Raises:
        ValueError: There is no such tokenizer or file, it has no fast version, or no template.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer {name_or_path!r}: expected a folder with tokenizer.json and tokenizer_config.json, or a name on the "
            f"hub that can be reached or is in its cache. It said: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer {name_or_path!r} is {type(tokenizer).__name__}, expected a fast one (with a tokenizer.json): convert it "
            "with transformers, or take another"
        )
    if template == "plain":
        tokenizer.chat_template = plain_template(bos=tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    elif template is not None:
        tokenizer.chat_template = read_template(template)
    elif tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer {name_or_path!r} has no chat template, as those of base models: set prompt.chat_template to plain, "
            "or to the path of a .jinja file"
        )
    return tokenizer


def read_template(path: str) -> str:
    """The text of a Jinja file.

    Raises:
        ValueError: There is none.
    """
    if not Path(path).is_file():
        raise ValueError(f"prompt.chat_template {path!r} is not a file: expected the path of a Jinja template")
    return Path(path).read_text(encoding="utf-8")


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
