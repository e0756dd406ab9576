"""What `trainer.precision` does to weights that are narrow, or would become so.

Two narrow types do not go together: torch's autocast to one of them takes float32 beside it, and not the other. And what trains
should be float32: a bfloat16 weight has 8 significant bits, and stays where it is when a step is below 1/512 of it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

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


def check_trained(parts: Mapping[str, Part], precision: Any) -> None:
    """Says so where `trainer.precision` makes what trains bfloat16, for which there may be reasons (memory), and refuses float16.

    Args:
        parts: The built parts by name.
        precision: Lightning's name of it.

    Raises:
        ValueError: What trains would be float16, whose smallest numbers gradients and AdamW's epsilon fall below.
    """
    if precision not in ("bf16-true", "16-true"):
        return
    dtype = "bfloat16" if precision == "bf16-true" else "float16"
    numbers = {
        name: sum(weight.numel() for _, weight in part.own_named_parameters() if weight.requires_grad)
        for name, part in parts.items()
    }
    trained = ", ".join(f"{number:,} of {name}" for name, number in numbers.items() if number)
    mixed = precision.replace("true", "mixed")
    remedy = f"{mixed} computes as fast with weights of float32; what is frozen may stay narrow (dtype {dtype})"
    if precision == "16-true" and trained:
        raise ValueError(
            f"trainer.precision is {precision}, which makes all weights that train {dtype} ({trained}): gradients below 6e-8 and "
            f"AdamW's epsilon are 0 there. Set it to {mixed}: {remedy}"
        )
    if trained:
        rank_zero_warn(
            f"trainer.precision is {precision}, which makes all weights that train {dtype} ({trained}), and so the optimizer's "
            f"state: steps below 1/512 of a weight, most of them at usual learning rates, are rounded away. {remedy}"
        )
