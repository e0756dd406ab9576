"""How a ready multimodal model takes media: what it asks of decoding, and what it is told of a clip.

Shape suffixes: F frames, S samples.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from datamodules.batch import Modality
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip

if TYPE_CHECKING:
    from datamodules.pretrained_processor import PretrainedProcessor

CLOCK = 1_000_000
"""Times of frames are handed on as numbers of frames of a video that has so many a second: exact to a microsecond."""

Sizes = dict[str, int]
"""What transformers calls `size`; for Qwen-VL {shortest_edge: 3136, longest_edge: 1003520}, the pixels of an image."""


class ReadyModel(Protocol):
    """What the data side uses of a ready model."""

    sampling: Any
    image_resize: Sizes | None
    video_resize: Sizes | None

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
        size: The option `image_resize` or `video_resize`.
        sampling: Which frames of a video.
        sample_rate: Of sounds, in Hz.
        min_samples: Fewest samples of a sound.
    """

    preparer: str
    size: Sizes | None = None
    sampling: Any = None
    sample_rate: int = 0
    min_samples: int = 1


class ReadyMedia:
    """One kind of media of a ready model, in the place of an encoder.

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


class Unchanged:
    """In the place of a projector: `ReadyMedia` counts placeholders already."""

    def num_tokens(self, num_features: int) -> int:
        """The same number."""
        return num_features

    def spec(self) -> dict[str, Any]:
        """None."""
        return {}


def blank(modality: Modality, shape: tuple[int, ...], sample_rate: int) -> Any:
    """A black or silent medium of a shape; clips have a frame a second."""
    match modality:
        case "image":
            return Image.new("RGB", (shape[1], shape[0]))
        case "video":
            return Clip(np.zeros((*shape, 3), np.uint8), np.arange(float(shape[0])))
        case "audio":
            return Waveform(np.zeros(shape, np.float32), sample_rate)


def metadata(clip: Clip) -> Any:
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
