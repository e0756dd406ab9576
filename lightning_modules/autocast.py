"""Two narrow types do not go together: torch's autocast to one of them takes float32 beside it, and not the other."""

from collections.abc import Mapping
from typing import Any

import torch

from encoders.base import Part
from encoders.stored import StoredEmbedding, StoredLinear

_REFUSED = {"16-mixed": torch.bfloat16, "bf16-mixed": torch.float16}


def check_types(parts: Mapping[str, Part], precision: Any) -> None:
    """Refuses parts that compute in the narrow type to which `trainer.precision` does not cast.

    Args:
        parts: The built parts by name.
        precision: Lightning's name of it.

    Raises:
        ValueError: There is one.
    """
    refused = _REFUSED.get(precision)
    for name, part in parts.items():
        layers = (layer for layer in part.modules() if not isinstance(layer, StoredLinear | StoredEmbedding))
        if refused and any(weight.dtype == refused for layer in layers for weight in layer.parameters(recurse=False)):
            dtype, other = str(refused).removeprefix("torch."), "float16" if refused == torch.bfloat16 else "bfloat16"
            raise ValueError(
                f"{name} has weights of {dtype}, and trainer.precision is {precision}, which computes in {other}: set "
                f"{name}.dtype to {other} or float32, or {name}.compute_dtype to float32, which keeps what is stored"
            )
