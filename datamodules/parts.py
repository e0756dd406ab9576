"""What the data side knows of the model's parts: how media become tensors, and how many tokens they take."""

import importlib
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
        ValueError: The class cannot be imported, or does not take these options.
    """
    path = spec["class_path"]
    module, _, name = path.rpartition(".")
    try:
        part_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"a saved processor needs the class {path!r}, which cannot be imported: {error}") from error
    return part_class.from_spec(spec)
