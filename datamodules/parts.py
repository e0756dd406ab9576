"""What the data side knows of the model's parts: how media become tensors, and how many tokens they take."""

import pydoc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from datamodules.batch import FeatureKey, MediaItem


class EncoderLike(Protocol):
    """What the data side uses of an encoder."""

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """Decoded media to a tensor."""

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        """Features of an item of this shape."""

    def spec(self) -> dict[str, Any]:
        """Class and options, as JSON."""


class ProjectorLike(Protocol):
    """What the data side uses of a projector."""

    def num_tokens(self, num_features: int) -> int:
        """Embeddings that so many features become."""

    def spec(self) -> dict[str, Any]:
        """Class and options, as JSON."""


class FusionLike(Protocol):
    """What the data side uses of a fusion."""

    def num_placeholders(self, num_embeddings: int) -> int:
        """Tokens that the embeddings of a medium take in a row."""

    def spec(self) -> dict[str, Any]:
        """Class and options, as JSON."""


def media_shape(decoded: Any) -> tuple[int, ...]:
    """Shape of a decoded medium: (height, width) of a picture, else that of the array."""
    if isinstance(decoded, Image.Image):
        return decoded.height, decoded.width
    return tuple(decoded.shape)


@dataclass(frozen=True)
class Prepared:
    """A medium that needs no decoding and no transform any more.

    Args:
        tensor: What the encoder's transform gave, or the features that the encoder gave, (L, D).
        num_features: How many features the encoder makes of it in the end.
        has_features: Whether the tensor is the features.
        feature_key: Under which its features are to be kept once they are there; None: not at all.
    """

    tensor: Tensor
    num_features: int
    has_features: bool = False
    feature_key: FeatureKey | None = None


def num_features(medium: Any, encoder: EncoderLike) -> int:
    """How many features a medium becomes, decoded or prepared."""
    return medium.num_features if isinstance(medium, Prepared) else encoder.num_tokens(media_shape(medium))


def media_item(key: str, medium: Any, encoder: EncoderLike, num_tokens: int, position: int) -> MediaItem:
    """A medium of a row, decoded or prepared, ready for a batch; see `MediaItem`."""
    if isinstance(medium, Prepared):
        return MediaItem(key, medium.tensor, num_tokens, position, medium.has_features, medium.feature_key)
    return MediaItem(key, encoder.transform(medium), num_tokens, position)


def part_from_spec(spec: dict[str, Any]) -> Any:
    """The part that a spec describes; its class is imported by its path, so that the data side needs no model code.

    Raises:
        ValueError: There is no such class, or it does not take these options.
    """
    part_class: Any = pydoc.locate(spec["class_path"])
    if part_class is None:
        raise ValueError(f"a saved processor needs the class {spec['class_path']!r}, which is not there: install or write it")
    return part_class.from_spec(spec)
