"""The data side of a ready multimodal model: its own processor prepares the media, its own template writes them.

Shape suffixes: F frames, S samples.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, empty

from datamodules.batch import IGNORE_INDEX, MODALITIES, Example, MediaItem, Modality, RowError
from datamodules.conversation import Sample
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip
from datamodules.parts import media_shape, part_from_spec
from datamodules.processor import Processor
from datamodules.processor_files import DESCRIPTION, as_folder, read_files
from datamodules.prompt_options import PromptOptions
from datamodules.ready_chat import ReadyChat, load_ready
from datamodules.template import ConversationError
from datamodules.tokens import Encoded, limit_length

CLOCK = 1_000_000
"""Times of frames are handed on as numbers of frames of a video that has so many a second: exact to a microsecond."""

Sizes = dict[str, int]
"""What transformers calls `size`, such as {shortest_edge: 3136, longest_edge: 1003520} (pixels of an image, for Qwen-VL)."""


class ReadyModel(Protocol):
    """What the data side uses of a ready model."""

    sampling: Any
    image_size: Sizes | None
    video_size: Sizes | None

    def spec(self) -> dict[str, Any]:
        """Class and options, as JSON."""


class PreparedRow(NamedTuple):
    """The media of one kind of a row: the model's arguments by name, and what stands for each of the media in the text."""

    inputs: dict[str, Tensor]
    replacements: list[str]


@dataclass(frozen=True)
class ReadyTransform:
    """How a ready model takes media of a kind: what decoding asks for, and all that their tensors depend on.

    Args:
        preparer: Class and options of the part of its processor that prepares them, as JSON; empty: it takes none.
        size: The option `image_size` or `video_size`.
        sampling: Which frames of a video.
        sample_rate: Of sounds, in Hz.
        min_samples: Fewest samples of a sound.
    """

    preparer: str
    size: Sizes | None
    sampling: Any
    sample_rate: int = 0
    min_samples: int = 1


class ReadyMedia:
    """One kind of media of a ready model, in the place of an encoder and of a projector.

    Args:
        processor: The processor.
        modality: The kind.
    """

    def __init__(self, processor: "PretrainedProcessor", modality: Modality) -> None:
        self._processor = processor
        self._modality = modality

    @cached_property
    def transform(self) -> Any:
        """A `ReadyTransform`. It makes no tensors: the media of a row are prepared together."""
        return self._processor.transform(self._modality)

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Placeholders of a medium of this shape."""
        return self._processor.num_tokens(self._modality, shape)

    def spec(self) -> dict[str, Any]:
        """None of its own: the processor's files say it."""
        return {}


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
        media: dict[Modality, ReadyMedia] = {modality: ReadyMedia(self, modality) for modality in MODALITIES}
        super().__init__(name_or_path, prompt, media, media)
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
            counts = [self._count(modality, text) for text in row.replacements]
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
        ready, token = self.chat.ready, self.chat.media_tokens[modality]
        options: dict[str, Any]
        match modality:
            case "image":
                options = {"images": [list(media)], "images_kwargs": _given(size=self.model.image_size)}
            case "video":
                options = {
                    "videos": [[clip.frames_FHW3 for clip in media]],
                    "videos_kwargs": {
                        "video_metadata": [[_metadata(clip) for clip in media]],
                        "do_sample_frames": False,
                        "input_data_format": "channels_last",
                        **_given(size=self.model.video_size),
                    },
                }
            case "audio":
                self._check_heard(media)
                options = {
                    "audio": [sound.samples_S for sound in media],
                    "audio_kwargs": {"sampling_rate": self.transform("audio").sample_rate},
                }
        made = ready(text=[token * len(media)], return_tensors="pt", return_text_replacement_offsets=True, **options)
        found = made.pop("text_replacement_offsets", [[]])[0]
        if len(found) != len(media):
            raise ValueError(f"{type(ready).__name__} does not tell what it writes for {modality} media: it is not supported")
        replacements = [place["replacement"] for place in found]
        if not all(self._count(modality, text) for text in replacements):
            raise ValueError(f"one of the {modality} media is so small that the model gives it no token: leave the row out")
        of_text = {*ready.tokenizer.model_input_names, "mm_token_type_ids", "token_type_ids", "video_metadata"}
        return PreparedRow({name: value for name, value in made.items() if name not in of_text}, replacements)

    def num_tokens(self, modality: Modality, shape: tuple[int, ...]) -> int:
        """Placeholders of a medium of this shape, found by preparing a blank one; a row with several media may differ."""
        if (modality, shape) not in self._counts:
            (text,) = self.prepare(modality, [self._blank(modality, shape)]).replacements
            self._counts[modality, shape] = self._count(modality, text)
        return self._counts[modality, shape]

    def encode(self, sample: Sample, num_tokens: Mapping[Modality, Sequence[int]], generate: bool = False) -> Encoded:
        """As that of every processor. What a model writes beside the placeholders (the time of a frame) is left out."""
        ids = self.chat.placeholder_ids
        texts = {m: self.tokenizer.convert_ids_to_tokens(min(ids[m])) for m, nums in num_tokens.items() if nums}
        return self._encode(sample, {m: [texts[m] * num for num in nums] for m, nums in num_tokens.items()}, generate)

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
                return ReadyTransform(text, self.model.image_size, None)
            case "video":
                return ReadyTransform(text, self.model.video_size, self.model.sampling)
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
        try:
            tokens = self._tokens(self.chat.with_media(replacements), sample, generate)
            placeholders = frozenset().union(*(self.chat.placeholder_ids[modality] for modality in self.chat.preparers))
            labels = [IGNORE_INDEX] * len(tokens.ids)
            for place in (place for span in tokens.spans for place in span):
                labels[place] = tokens.ids[place] if tokens.ids[place] not in placeholders else IGNORE_INDEX
            positions = {self.chat.media_ids[m]: self._positions(m, tokens.ids, texts) for m, texts in replacements.items()}
            cut = self.prompt.on_too_long == "cut" and not generate
            return limit_length(
                Encoded(tokens.ids, labels, tokens.choices, 0, positions), self.prompt.max_length, placeholders, cut
            )
        except ConversationError as error:
            raise RowError(sample.origin, str(error)) from error

    def _positions(self, modality: Modality, ids: Sequence[int], texts: Sequence[str]) -> list[int]:
        """Where the placeholders of each medium begin."""
        places = [place for place, token in enumerate(ids) if token in self.chat.placeholder_ids[modality]]
        counts = [self._count(modality, text) for text in texts]
        assert sum(counts) == len(places), f"{len(places)} placeholders for {counts} of {modality} media"
        return [places[sum(counts[:number])] for number in range(len(counts))]

    def _count(self, modality: Modality, text: str) -> int:
        ids = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return sum(token in self.chat.placeholder_ids[modality] for token in ids)

    def _blank(self, modality: Modality, shape: tuple[int, ...]) -> Any:
        match modality:
            case "image":
                return Image.new("RGB", (shape[1], shape[0]))
            case "video":
                return Clip(np.zeros((*shape, 3), np.uint8), np.arange(float(shape[0])))
            case "audio":
                return Waveform(np.zeros(shape, np.float32), self.transform("audio").sample_rate)

    def _check_heard(self, sounds: Sequence[Waveform]) -> None:
        """Refuses a sound that the feature extractor would cut off silently, at the length of its window."""
        window = vars(self.chat.preparers["audio"]).get("n_samples")
        for sound in sounds:
            (length,) = media_shape(sound)
            if (
                window is not None
                and length > window
                and self.num_tokens("audio", (2 * window,)) == self.num_tokens("audio", (window,))
            ):
                rate = sound.sample_rate
                raise ValueError(
                    f"a sound of {length / rate:.2f} s is longer than the {window / rate:g} s that the model hears: give a part "
                    "of it by 'start' and 'end', or leave the row out"
                )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _metadata(clip: Clip) -> Any:
    """The times of the frames, and the mean rate for models that know no more, as transformers hands them on."""
    from transformers.video_utils import VideoMetadata

    num_frames, height, width = clip.shape
    length = float(clip.times_F[-1] - clip.times_F[0])
    seconds = num_frames * length / (num_frames - 1) if length > 0 else 1.0  # each frame lasts until the next
    return VideoMetadata(
        total_num_frames=round(seconds * CLOCK),
        fps=float(CLOCK),
        width=width,
        height=height,
        duration=seconds,
        frames_indices=[round(float(time) * CLOCK) for time in clip.times_F],
    )
