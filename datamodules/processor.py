"""The one truth about text and pixels: a `Sample` in, an `Example` of token ids, labels and media tensors out."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.batch import MODALITIES, Example, MediaItem, Modality, RowError
from datamodules.cached_media import FeatureStore
from datamodules.chat_tokenizer import MEDIA_TOKENS, ChatTokenizer, load_tokenizer
from datamodules.conversation import Message, Sample, Text
from datamodules.fingerprint import fingerprint
from datamodules.parts import EncoderLike, FusionLike, ProjectorLike, media_item, num_features, part_from_spec
from datamodules.processor_files import DESCRIPTION, as_folder, read_files, tokenizer_files, write_files
from datamodules.prompt_options import PromptOptions
from datamodules.template import ConversationError
from datamodules.tokens import Encoded, Tokens, expand, limit_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Processor:
    """Turns samples into examples; the same object in training, evaluation, export and serving.

    What is learnt of an answer is everything from where its prompt ends to its end token, so that the tokens in front of it
    are exactly those of the prompt when the model is asked.

    Args:
        tokenizer: Hub name or folder of the tokenizer; read when it is first needed.
        prompt: Template, system message and length limit.
        encoders: The model's encoder of each modality; it need not be built.
        projectors: The model's projector of each modality; it need not be built.
        fusion: The model's fusion; None: each embedding of a medium takes the place of one token.

    Attributes:
        takes_prepared: Whether it takes single media that are transformed already, such as a cache has.

    Raises:
        ValueError: A modality has an encoder but no projector, or the other way round.
    """

    takes_prepared = True

    def __init__(
        self,
        tokenizer: str,
        prompt: PromptOptions = PromptOptions(),  # it is frozen
        encoders: Mapping[Modality, EncoderLike] | None = None,
        projectors: Mapping[Modality, ProjectorLike] | None = None,
        fusion: FusionLike | None = None,
    ) -> None:
        self.name_or_path = tokenizer
        self.prompt = prompt
        self.encoders = dict(encoders or {})
        self.projectors = dict(projectors or {})
        self.fusion = fusion
        self.features: Callable[[], FeatureStore | None] | None = None  # set by a model that keeps features
        self._files: dict[str, bytes] | None = None
        if self.encoders.keys() != self.projectors.keys():
            raise ValueError(
                f"encoders and projectors go together, got encoders for {sorted(self.encoders)} "
                f"and projectors for {sorted(self.projectors)}"
            )

    def __call__(
        self, sample: Sample, media: Mapping[Modality, Sequence[tuple[str, Any]]] | None = None, generate: bool = False
    ) -> Example:
        """Makes an example of a sample.

        Args:
            sample: The row.
            media: For each modality the key and the medium of each item, decoded or `Prepared`, in the order of `sample.media`.
            generate: Make the prompt for the last answer instead; that answer becomes the example's `reference`.

        Raises:
            RowError: The row cannot be used.
            ValueError: The tokenizer or the chat template cannot be used.
        """
        self.check_media(sample)
        media = media or {}
        num_tokens = {
            modality: [self._num_placeholders(modality, num_features(item, self.encoders[modality])) for _, item in items]
            for modality, items in media.items()
        }
        encoded = self.encode(sample, num_tokens, generate)
        places = {modality: encoded.positions[self.chat.media_ids[modality]] for modality in num_tokens}
        items: dict[str, list[MediaItem]] = {
            modality: [
                media_item(key, item, self.encoders[modality], num, position)
                for (key, item), num, position in zip(media[modality], nums, places[modality], strict=True)
            ]
            for modality, nums in num_tokens.items()
            if nums
        }
        return self._example(sample, encoded, items)

    def num_tokens(self, modality: Modality, shape: tuple[int, ...]) -> int:
        """How many tokens a medium of this shape takes in a row.

        Args:
            modality: Its kind.
            shape: Shape of the decoded medium, as `media_shape` gives it.
        """
        return self._num_placeholders(modality, self.encoders[modality].num_tokens(shape))

    def _num_placeholders(self, modality: Modality, num_features: int) -> int:
        num_embeddings = self.projectors[modality].num_tokens(num_features)
        return num_embeddings if self.fusion is None else self.fusion.num_placeholders(num_embeddings)

    def encode(self, sample: Sample, num_tokens: Mapping[Modality, Sequence[int]], generate: bool = False) -> Encoded:
        """The text of a sample as tokens, with media as placeholders; no medium is read.

        Args:
            sample: The row.
            num_tokens: For each modality the tokens of each item, in the order of `sample.media`.
            generate: End where the last answer starts, without labels.

        Raises:
            RowError: The row cannot be used.
            ValueError: The tokenizer or the chat template cannot be used.
        """
        self.check_media(sample)
        self._check_places(sample, num_tokens)
        try:
            tokens = self._tokens(self.chat, sample, generate)
            counts = {self.chat.media_ids[modality]: nums for modality, nums in num_tokens.items()}
            media_ids = self.chat.media_ids.values()
            return limit_length(
                expand(tokens, counts), self.prompt.max_length, media_ids, cut=self.prompt.on_too_long == "cut" and not generate
            )
        except ConversationError as error:
            raise RowError(sample.origin, str(error)) from error

    def check_media(self, sample: Sample) -> None:
        """Refuses a row with media that the model cannot read.

        Raises:
            RowError: It has some.
        """
        for modality in MODALITIES:
            if modality not in self.encoders and sample.media(modality):
                raise RowError(
                    sample.origin,
                    f"the row has {modality} in it, but the model has no encoder for that: set model.{modality}_encoder and "
                    f"model.{modality}_projector, or leave the row out",
                )

    def decode(self, token_ids: Iterable[int]) -> str:
        """Token ids as text: special tokens left out, the places of neighbouring media written as one `<image>`."""
        return self.chat.decode(token_ids)

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end an answer: the template's ends of turn, and the tokenizer's end of text."""
        return self.chat.eos_ids

    @property
    def pad_id(self) -> int:
        """The id that fills rows up to the batch's length; masked everywhere."""
        own = self.tokenizer.pad_token_id
        return self.eos_ids[0] if own is None else own

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer, with the tokens for media added and the chat template set.

        Raises:
            ValueError: It is not there, has no fast version, or no chat template.
        """
        return self.chat.tokenizer

    @cached_property
    def chat(self) -> ChatTokenizer:
        """The tokenizer at work, read when it is first needed."""
        if self._files is None:
            tokenizer = load_tokenizer(self.name_or_path, self.prompt.chat_template)
        else:
            with as_folder(self._files) as folder:
                tokenizer = load_tokenizer(str(folder), None)
        return ChatTokenizer(tokenizer, self.name_or_path)

    def files(self) -> dict[str, bytes]:
        """The processor as files, by name: what `save` writes and a checkpoint holds. Made once, when it is first asked for.

        The tokenizer's own template in them is the one in use, wherever it came from.
        """
        if self._files is None:
            description = {
                "tokenizer": self.name_or_path,
                "prompt": asdict(replace(self.prompt, chat_template=None)),
                "encoders": {modality: part.spec() for modality, part in self.encoders.items()},
                "projectors": {modality: part.spec() for modality, part in self.projectors.items()},
                "fusion": None if self.fusion is None else self.fusion.spec(),
            }
            text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
            self._files = {**tokenizer_files(self.tokenizer), DESCRIPTION: text.encode()}
        return self._files

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Processor":
        """The processor that `files` wrote down; nothing is fetched.

        Raises:
            ValueError: They are not those of a processor, or one of its parts cannot be made.
        """
        if DESCRIPTION not in files:
            raise ValueError(f"these are not the files of a processor: expected {DESCRIPTION} among {', '.join(sorted(files))}")
        saved = json.loads(files[DESCRIPTION])
        if "ready_model" in saved:
            from datamodules.pretrained_processor import PretrainedProcessor

            return PretrainedProcessor.from_saved(saved, files)
        encoders = {modality: part_from_spec(spec) for modality, spec in saved["encoders"].items()}
        projectors = {modality: part_from_spec(spec) for modality, spec in saved["projectors"].items()}
        fusion = None if saved["fusion"] is None else part_from_spec(saved["fusion"])
        processor = cls(saved["tokenizer"], PromptOptions(**saved["prompt"]), encoders, projectors, fusion)
        processor._files = dict(files)
        return processor

    def save(self, folder: str | Path) -> None:
        """Writes `files` into a folder, each under a temporary name first."""
        write_files(Path(folder), self.files())

    @classmethod
    def load(cls, folder: str | Path) -> "Processor":
        """The processor that `save` wrote; it does not need the folder any more.

        Raises:
            ValueError: There is none, or one of its parts cannot be made.
        """
        if not Path(folder, DESCRIPTION).is_file():
            raise ValueError(f"no {DESCRIPTION} in {folder}: expected a folder that a processor was saved to")
        return cls.from_files(read_files(Path(folder)))

    def fingerprint(self) -> str:
        """The same for two processors that make the same examples, wherever their tokenizer and their parts come from."""
        return fingerprint(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # a loader worker gets what the parts are, not the weights that they may have by then
        return type(self).from_files, (self.files(),)

    def _check_places(self, sample: Sample, given: Mapping[Modality, Sequence[Any]]) -> None:
        for modality in MODALITIES:
            got, expected = len(given.get(modality, ())), len(sample.media(modality))
            if got != expected:
                raise ValueError(f"{sample.origin}: expected the {modality} of {expected} places in the row, got {got}")

    def _tokens(self, tokenizer: ChatTokenizer, sample: Sample, generate: bool) -> Tokens:
        """A sample as the tokenizer writes it, and what is learnt of it."""
        messages = self._messages(sample, generate)
        chat = [(message.role, self._text(message)) for message in messages]
        if generate:
            return Tokens(tokenizer.prompt(chat), [], None)
        for choice in sample.choices:
            tokenizer.check_text(choice)
        return tokenizer.write(chat, [number for number, message in enumerate(messages) if message.supervised], sample.choices)

    def _example(self, sample: Sample, encoded: Encoded, media: dict[str, list[MediaItem]]) -> Example:
        last = sample.messages[-1]
        prompts = [message.text for message in sample.messages if message.role == "user"]
        return Example(
            origin=sample.origin,
            id=sample.id,
            tokens=encoded.tokens,
            labels=encoded.labels,
            media=media,
            choices=encoded.choices,
            prompt=prompts[-1] if prompts else "",
            reference=last.text if last.role == "assistant" else "",
            num_dropped_tokens=encoded.num_dropped,
        )

    def _messages(self, sample: Sample, generate: bool) -> list[Message]:
        """The messages that are written: with the system message of the options, and without the answer to be generated."""
        messages = list(sample.messages)
        if generate and messages[-1].role == "assistant":
            messages.pop()
        elif not generate and not any(message.supervised for message in messages):
            raise ConversationError("the row has no answer to learn from: expected an assistant message that is in the loss")
        if self.prompt.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", (Text(self.prompt.system),)))
        return messages

    def _text(self, message: Message) -> str:
        """A message with one token for each medium."""
        for piece in message.content:
            if isinstance(piece, Text):
                self.chat.check_text(piece.text)
        return "".join(piece.text if isinstance(piece, Text) else MEDIA_TOKENS[piece.modality] for piece in message.content)
