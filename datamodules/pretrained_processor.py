"""The data side of a ready multimodal model: its own processor prepares the media, its own template writes them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, device, empty

from datamodules.batch import IGNORE_INDEX, MODALITIES, Example, MediaItem, Modality, RowError
from datamodules.conversation import Sample
from datamodules.parts import part_from_spec
from datamodules.processor import Processor
from datamodules.processor_files import DESCRIPTION, as_folder, read_files
from datamodules.prompt_options import PromptOptions
from datamodules.ready_chat import ReadyChat, load_ready
from datamodules.ready_media import PreparedRow, ReadyMedia, ReadyModel, ReadyTransform, Unchanged, blank, metadata
from datamodules.template import ConversationError
from datamodules.tokens import Encoded, limit_length


class PretrainedProcessor(Processor):
    """Turns samples into examples for a ready model, by its own processor: pixels, mels, placeholders and template are its own.

    The media of a row are prepared together, as some models do that otherwise for several images than for one. Nothing is
    cut: what the processor would leave out is an error of the row.

    Args:
        name_or_path: Hub name or folder of the processor; read when it is first needed.
        prompt: Template, system message and length limit.
        model: The model; it need not be built.
    """

    takes_prepared = False

    def __init__(self, name_or_path: str, prompt: PromptOptions, model: ReadyModel) -> None:
        encoders: dict[Modality, ReadyMedia] = {modality: ReadyMedia(self, modality) for modality in MODALITIES}
        super().__init__(name_or_path, prompt, encoders, dict.fromkeys(encoders, Unchanged()))
        self.model = model
        self._counts: dict[tuple[Modality, tuple[int, ...]], int] = {}

    @cached_property
    def chat(self) -> ReadyChat:
        """The model's processor and tokenizer at work, read when they are first needed."""
        if self._files is None:
            return ReadyChat(load_ready(self.name_or_path, self.prompt.chat_template), self.name_or_path)
        with as_folder(self._files) as folder:
            return ReadyChat(load_ready(str(folder), None), self.name_or_path)

    def __call__(
        self, sample: Sample, media: Mapping[Modality, Sequence[tuple[str, Any]]] | None = None, generate: bool = False
    ) -> Example:
        self.check_media(sample)
        given = {modality: items for modality, items in (media or {}).items() if items}
        try:
            rows = {modality: self.prepare(modality, [item for _, item in items]) for modality, items in given.items()}
        except ValueError as error:
            raise RowError(sample.origin, str(error)) from error
        encoded = self._encode(sample, {modality: row.replacements for modality, row in rows.items()}, generate)
        types = self.chat.token_types(encoded.tokens)
        items: dict[str, list[MediaItem]] = {}
        for modality, row in rows.items():
            counts = [self.chat.num_placeholders(text) for text in row.replacements]
            places = encoded.positions[self.chat.media_ids[modality]]
            items[modality] = [
                MediaItem(key, empty(0), num, place) for (key, _), num, place in zip(given[modality], counts, places, strict=True)
            ]
        inputs: dict[str, dict[str, Tensor]] = {modality: row.inputs for modality, row in rows.items()}
        return replace(self._example(sample, encoded, items), inputs=inputs, token_types=types)

    def prepare(self, modality: Modality, media: Sequence[Any]) -> PreparedRow:
        """The decoded media of a row, of one kind, as the model takes them.

        Raises:
            ValueError: The model's processor refuses one, or would not take all of it.
        """
        if modality not in self.chat.preparers:
            raise ValueError(f"{self.name_or_path} takes no {modality} media")
        for sound in media if modality == "audio" else []:
            if sound.shape[0] > self._window:
                rate = self.transform("audio").sample_rate
                raise ValueError(
                    f"a sound of {sound.shape[0] / rate:.2f} s is longer than the {self._window / rate:g} s that the model "
                    "hears: give a part of it by 'start' and 'end', or leave the row out"
                )
        return self._prepare(modality, media)

    def _prepare(self, modality: Modality, media: Sequence[Any]) -> PreparedRow:
        ready, token = self.chat.ready, self.chat.media_tokens[modality]
        options: dict[str, Any]
        match modality:
            case "image":
                options = {"images": [list(media)], "images_kwargs": _given(size=self.model.image_resize)}
            case "video":
                options = {
                    "videos": [[clip.frames_FHW3 for clip in media]],
                    "videos_kwargs": {
                        "video_metadata": [[metadata(clip) for clip in media]],
                        "do_sample_frames": False,
                        "input_data_format": "channels_last",
                        **_given(size=self.model.video_resize),
                    },
                }
            case "audio":
                options = {
                    "audio": [sound.samples_S for sound in media],
                    "audio_kwargs": {"sampling_rate": self.transform("audio").sample_rate},
                }
        with device("cpu"):  # a model may be on its way to another one
            made = ready(text=[token * len(media)], return_tensors="pt", return_text_replacement_offsets=True, **options)
        found = made.pop("text_replacement_offsets", [[]])[0]
        if len(found) != len(media):
            raise ValueError(f"{type(ready).__name__} does not tell what it writes for {modality} media: it is not supported")
        replacements = [place["replacement"] for place in found]
        if not all(self.chat.num_placeholders(text) for text in replacements):
            raise ValueError(f"one of the {modality} media is so small that the model gives it no token: leave the row out")
        of_text = {*ready.tokenizer.model_input_names, "mm_token_type_ids", "token_type_ids", "video_metadata"}
        return PreparedRow({name: value for name, value in made.items() if name not in of_text}, replacements)

    def num_tokens(self, modality: Modality, shape: tuple[int, ...]) -> int:
        """Placeholders of a medium of this shape, found by preparing a blank one; a row with several media may differ."""
        if (modality, shape) not in self._counts:
            (text,) = self.prepare(modality, [blank(modality, shape, self.transform(modality).sample_rate)]).replacements
            self._counts[modality, shape] = self.chat.num_placeholders(text)
        return self._counts[modality, shape]

    def encode(self, sample: Sample, num_tokens: Mapping[Modality, Sequence[int]], generate: bool = False) -> Encoded:
        """As that of every processor. What a model writes beside the placeholders (the time of a frame) is left out."""
        texts = {modality: self.chat.placeholders(modality, nums) for modality, nums in num_tokens.items() if nums}
        return self._encode(sample, texts, generate)

    def check_media(self, sample: Sample) -> None:
        takes = self.chat.preparers
        for modality in MODALITIES:
            if modality not in takes and sample.media(modality):
                raise RowError(
                    sample.origin,
                    f"the row has {modality} in it, but {self.name_or_path} ({type(self.chat.ready).__name__}) takes "
                    f"{' and '.join(takes)} only: leave the row out, or take another model",
                )

    def transform(self, modality: Modality) -> ReadyTransform:
        """What decoding and caches ask for."""
        preparer = self.chat.preparers.get(modality)
        if preparer is None:
            return ReadyTransform("", None, None)
        text = f"{type(preparer).__name__} {preparer.to_json_string()}"
        match modality:
            case "image":
                return ReadyTransform(text, self.model.image_resize, None)
            case "video":
                return ReadyTransform(text, self.model.video_resize, self.model.sampling)
            case "audio":
                return ReadyTransform(text, None, None, preparer.sampling_rate)

    def files(self) -> dict[str, bytes]:
        if self._files is None:
            description = {
                "tokenizer": self.name_or_path,
                "prompt": asdict(replace(self.prompt, chat_template=None)),
                "ready_model": self.model.spec(),
            }
            with TemporaryDirectory(prefix="omnilit-") as folder:
                self.chat.ready.save_pretrained(folder)
                self._files = {**read_files(Path(folder)), DESCRIPTION: (json.dumps(description, indent=2) + "\n").encode()}
        return self._files

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any], files: Mapping[str, bytes]) -> "PretrainedProcessor":
        """The processor that `files` wrote down; see `Processor.from_files`.

        Args:
            saved: The description among them.
            files: All of them.
        """
        processor = cls(saved["tokenizer"], PromptOptions(**saved["prompt"]), part_from_spec(saved["ready_model"]))
        processor._files = dict(files)
        return processor

    def _encode(self, sample: Sample, replacements: Mapping[Modality, Sequence[str]], generate: bool) -> Encoded:
        self._check_places(sample, replacements)
        chat = self.chat.with_media(replacements)
        try:
            tokens = self._tokens(chat, sample, generate)
            labels = [IGNORE_INDEX] * len(tokens.ids)
            for place in (place for span in tokens.spans for place in span):
                labels[place] = IGNORE_INDEX if tokens.ids[place] in chat.placeholder_ids else tokens.ids[place]
            positions = _positions(chat, tokens.ids)
            encoded = Encoded(tokens.ids, labels, tokens.choices, 0, positions)
            cut = self.prompt.on_too_long == "cut" and not generate
            return limit_length(encoded, self.prompt.max_length, chat.placeholder_ids, cut)
        except ConversationError as error:
            raise RowError(sample.origin, str(error)) from error

    @cached_property
    def _window(self) -> float:
        """Samples of the longest sound that is heard whole: some feature extractors silently cut at the end of their window."""
        window = vars(self.chat.preparers["audio"]).get("n_samples", math.inf)
        if math.isinf(window):
            return window
        long, short = (self._prepare("audio", [blank("audio", (size,), 0)]).replacements for size in (2 * window, window))
        return window if long == short else math.inf


def _positions(chat: ReadyChat, ids: Sequence[int]) -> dict[int, list[int]]:
    """Where the placeholders of each medium begin, under the id of its kind.

    Raises:
        ConversationError: There are others than the media have.
    """
    places = [place for place, token in enumerate(ids) if token in chat.placeholder_ids]
    texts = {modality: iter(replacements) for modality, replacements in chat.replacements.items()}
    positions: dict[int, list[int]] = {chat.media_ids[modality]: [] for modality in texts}
    done = 0
    for modality in chat.order:
        positions[chat.media_ids[modality]].append(places[done])
        done += chat.num_placeholders(next(texts[modality]))
    if done != len(places) or any(len(positions[chat.media_ids[m]]) != len(given) for m, given in chat.replacements.items()):
        raise ConversationError(
            f"the chat template writes other placeholders for media than the {type(chat.ready).__name__} of the model knows "
            f"({', '.join(chat.media_tokens.values())}): set prompt.chat_template to one that fits"
        )
    return positions


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
