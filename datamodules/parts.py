"""What the data side knows of the model's parts: how media become tensors, and how many tokens they take."""

import pydoc
from collections.abc import Callable
from typing import Any, Protocol

from PIL import Image
from torch import Tensor


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


def media_shape(decoded: Any) -> tuple[int, ...]:
    """Shape of a decoded medium: (height, width) of a picture, else that of the array."""
    if isinstance(decoded, Image.Image):
        return decoded.height, decoded.width
    return tuple(decoded.shape)


def part_from_spec(spec: dict[str, Any]) -> Any:
    """The part that a spec describes; its class is imported by its path, so that the data side needs no model code.

    Raises:
        ValueError: There is no such class, or it does not take these options.
    """
    part_class: Any = pydoc.locate(spec["class_path"])
    if part_class is None:
        raise ValueError(f"a saved processor needs the class {spec['class_path']!r}, which is not there: install or write it")
    return part_class.from_spec(spec)
