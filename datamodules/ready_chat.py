"""Conversations with media as token ids, written by the chat template and the processor of a ready multimodal model."""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datamodules.batch import MODALITIES, Modality
from datamodules.chat_tokenizer import MEDIA_TOKENS, ChatTokenizer, read_template
from datamodules.template import Chat, ConversationError, Written

if TYPE_CHECKING:
    from transformers import ProcessorMixin

PREPARERS: dict[Modality, tuple[str, ...]] = {
    "image": ("image_processor",),
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}
"""What transformers calls the part of a processor that prepares media of a kind."""

_MARKER = "OmniLitMessage0Text"
_MEDIA = re.compile(f"({'|'.join(map(re.escape, MEDIA_TOKENS.values()))})")
_MODALITIES = {token: modality for modality, token in MEDIA_TOKENS.items()}


class ReadyChat(ChatTokenizer):
    """The tokenizer of a ready model at work. Media stand in its chats as `MEDIA_TOKENS`.

    The template writes a medium in its own way (`<|vision_start|><|image_pad|><|vision_end|>`), and the processor replaces
    the placeholder in that by what the medium takes: both as when transformers does it.

    Args:
        ready: The model's processor.
        name: What errors call it.

    Raises:
        ValueError: The model takes no media, or not by placeholders.
    """

    def __init__(self, ready: "ProcessorMixin", name: str) -> None:
        self.preparers = {modality: part for modality in MODALITIES if (part := _preparer(ready, modality)) is not None}
        if not self.preparers:
            raise ValueError(f"{type(ready).__name__} of {name!r} marks no media by a token of their own: it is not supported")
        super().__init__(ready.tokenizer, name, {modality: vars(ready)[f"{modality}_token"] for modality in self.preparers})
        self.ready = ready
        self.replacements: Mapping[Modality, Sequence[str]] = {}
        self.order: list[Modality] = []
        ids = [*ready.image_token_ids, *ready.video_token_ids, *ready.audio_token_ids]  # None where the model takes no such media
        self.placeholder_ids = {number for number in ids if number is not None}
        self._placeholders = [str(self.tokenizer.convert_ids_to_tokens(number)) for number in sorted(self.placeholder_ids)]
        bos = self.tokenizer.bos_token
        # transformers lets the tokenizer put it in front where the template does not
        self._bos = bos if bos is not None and self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id] else ""

    def with_media(self, replacements: Mapping[Modality, Sequence[str]]) -> "ReadyChat":
        """The same for the media of one row; once it has written them, `order` has the kind of each of them in reading order.

        Args:
            replacements: For each modality what is written for each of its media, in reading order.
        """
        chat = copy(self)
        chat.replacements = replacements
        return chat

    def placeholders(self, modality: Modality, numbers: Sequence[int]) -> list[str]:
        """So many placeholders of a medium, for each number."""
        token = self.media_tokens[modality]
        if token not in self._placeholders:  # the template's word for a medium, of which none is left in the end
            token = self._placeholders[0]
        return [token * number for number in numbers]

    def num_placeholders(self, text: str) -> int:
        """How many placeholders stand in a text; a video may have those of its images."""
        return sum(text.count(token) for token in self._placeholders)

    def token_types(self, ids: list[int]) -> list[int] | None:
        """The kind of each token, as transformers numbers them: 0 text, 1 image, 2 video, 3 audio; None: the model needs none."""
        return self.ready.create_mm_token_type_ids([ids])[0] if self.ready.return_mm_token_type_ids else None

    def _write(self, chat: Chat, generate: bool = False) -> Written:
        """The chat, its media written out."""
        written = super()._write(self._spell(chat), generate)
        replacements = [list(self.replacements.get(modality, ())) for modality in MODALITIES]
        (text,), offsets = self.ready.get_text_with_replacements([written.text], *replacements)
        found: Any = offsets[0] if offsets else []
        self.order = [place["type"] for place in found]
        grown = [(place["span"][1], place["new_span"][1] - place["span"][1]) for place in found]

        def moved(place: int) -> int:
            return place + next((growth for end, growth in reversed(grown) if end <= place), 0)

        answers = tuple(
            replace(answer, start=moved(answer.start), content=(moved(answer.content[0]), moved(answer.content[1])))
            for answer in written.answers
        )
        return Written(text, answers)

    def _spell(self, chat: Chat) -> Chat:
        """The chat with each medium as the template writes it, so that its messages are texts.

        Messages are taken from the last to the first, since templates number media. A marker in the place of a message shows
        what the template writes around it.

        Raises:
            ConversationError: The template does not write the message between what it writes around a text.
        """
        if not any(_MEDIA.search(text) for _, text in chat):
            return chat
        rendered = self._render(chat, False)
        spelled = list(chat)
        for number, (role, text) in reversed(list(enumerate(chat))):
            if _MEDIA.search(text) is None:
                continue
            spelled[number] = (role, _MARKER)
            before, _, after = self._render(spelled, False).partition(_MARKER)
            end = len(rendered) - len(after)
            if len(before) > end or not (rendered.startswith(before) and rendered.endswith(after)):
                break
            spelled[number] = (role, rendered[len(before) : end])
        if self._render(spelled, False) != rendered:
            raise ConversationError(
                "the chat template writes the message with media otherwise than a text, so it cannot be told where the answers "
                "start: put the media into another message, or set prompt.chat_template to another one"
            )
        return spelled

    def _content(self, text: str) -> Any:
        pieces = [piece for piece in _MEDIA.split(text) if piece]
        return [
            {"type": _MODALITIES[piece]} if piece in _MODALITIES else {"type": "text", "text": piece} for piece in pieces or [""]
        ]

    def _render(self, chat: Chat, add_generation_prompt: bool) -> str:
        rendered = super()._render(chat, add_generation_prompt)
        if "'text': 'OmniLitMessage" in rendered:
            raise ValueError(
                f"the chat template of {self.name!r} takes only a text as the content of some message, and writes a list of "
                "parts as Python does: set prompt.chat_template to one that takes lists, as those of multimodal models do"
            )
        return rendered if rendered.startswith(self._bos) else self._bos + rendered


def load_ready(name_or_path: str, template: str | None) -> "ProcessorMixin":
    """Reads the processor of a ready model, and gives it and its tokenizer one chat template.

    Args:
        name_or_path: Hub name or folder.
        template: None: its own; or the path of a Jinja file.

    Raises:
        ValueError: There is no such processor, or it has no fast tokenizer or no template.
    """
    from transformers import AutoProcessor, PreTrainedTokenizerFast, ProcessorMixin

    try:
        ready = AutoProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no processor {name_or_path!r}: expected a folder with processor_config.json (or preprocessor_config.json) and "
            "tokenizer.json, or a name on the hub that can be reached or is in its cache. It said: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(ready, ProcessorMixin):
        raise ValueError(
            f"{name_or_path!r} has a {type(ready).__name__} and no processor for media: it is no ready multimodal model. Use "
            "LanguageModel with encoders, or another model"
        )
    if not isinstance(ready.tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer of {name_or_path!r} is {type(ready.tokenizer).__name__}, expected a fast one")
    if template == "plain":
        raise ValueError("prompt.chat_template plain has no place for media: give the path of a .jinja file, or null")
    if template is not None:
        ready.chat_template = read_template(template)
    ready.chat_template = ready.tokenizer.chat_template = ready.chat_template or ready.tokenizer.chat_template
    if ready.chat_template is None:
        raise ValueError(f"the processor of {name_or_path!r} has no chat template: set prompt.chat_template to a .jinja file")
    return ready


def _preparer(ready: "ProcessorMixin", modality: Modality) -> Any:
    """The part of a processor that prepares media of a kind; None where the model takes none."""
    names = [name for name in PREPARERS[modality] if name in type(ready).get_attributes()]
    return vars(ready)[names[0]] if names and vars(ready).get(f"{modality}_token") is not None else None
