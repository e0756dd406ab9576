"""What the encoders from transformers share: configuration and weights, and errors that say what to do."""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from encoders.base import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read_config(name_or_path: str) -> "PreTrainedConfig":
    """The configuration of a checkpoint.

    Args:
        name_or_path: Name on the hub, or a folder with `config.json`.

    Raises:
        ValueError: There is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise _unreachable(name_or_path, "config.json", error) from error


def read_feature_extractor(name_or_path: str) -> dict[str, Any]:
    """The options of a checkpoint's feature extractor; empty where it has none.

    Args:
        name_or_path: Name on the hub, or a folder.

    Raises:
        ValueError: The checkpoint cannot be reached.
    """
    from transformers.models.auto.feature_extraction_auto import get_feature_extractor_config

    try:
        return get_feature_extractor_config(name_or_path)
    except (OSError, ValueError) as error:
        raise _unreachable(name_or_path, "preprocessor_config.json", error) from error


def num_blocks(layer: int | None, depth: int, name_or_path: str) -> int:
    """How many of a checkpoint's blocks are kept, so that the last one gives the features.

    Args:
        layer: As an encoder's option: from 1, or from -1, that of the last block; None: all are kept.
        depth: Blocks that the checkpoint has.
        name_or_path: The checkpoint, for the error.

    Raises:
        ValueError: It has no such layer.
    """
    if layer is None:
        return depth
    if abs(layer) > depth:
        raise ValueError(f"layer {layer} does not exist in {name_or_path}, which has {depth} layers")
    return layer if layer > 0 else depth + 1 + layer


def load_model(
    model_class: Any,
    name_or_path: str,
    config: "PreTrainedConfig",
    dtype: torch.dtype,
    unused: Set[str] = frozenset(),
    key_mapping: Mapping[str, str] | None = None,
) -> nn.Module:
    """A model with the weights of a checkpoint, all of which must be there; what the checkpoint has besides is left out.

    Args:
        model_class: Its class in transformers.
        name_or_path: Name on the hub, or a folder.
        config: Its configuration.
        dtype: Type of the weights.
        unused: Parameters that may be missing.
        key_mapping: Patterns in the checkpoint's names, and what stands there in the model's.

    Raises:
        ValueError: The weights cannot be read, or do not fit the model.
    """
    from safetensors import SafetensorError

    options: dict[str, Any] = {} if key_mapping is None else {"key_mapping": dict(key_mapping)}
    try:
        with _errors_only():  # it would list every weight of another tower or a dropped block; what matters is checked below
            model, report = model_class.from_pretrained(
                name_or_path, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except (OSError, SafetensorError) as error:
        raise _unreachable(name_or_path, "readable weights", error) from error
    if wrong := misfits(report, unused):
        raise ValueError(
            f"the weights of {name_or_path} do not fit {type(model).__name__}: {len(wrong)} tensors are missing or have "
            f"another shape ({', '.join(wrong[:5])}): give a checkpoint of that class, whose config.json belongs to it"
        )
    return model


def misfits(report: Mapping[str, Any], unused: Set[str] = frozenset()) -> list[str]:
    """The weights for which `from_pretrained` drew random ones: those that are missing or have another shape.

    Args:
        report: What it gives with `output_loading_info`.
        unused: Parameters that may be missing.
    """
    wrong = sorted(set(report["missing_keys"]) - unused)
    return wrong + [f"{name} {tuple(saved)} instead of {tuple(own)}" for name, saved, own in sorted(report["mismatched_keys"])]


def _unreachable(name_or_path: str, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"name_or_path {name_or_path!r} gives no {what}: it is neither a folder that holds one, nor a model that the "
        f"hub or its cache gave ({one_line(error)}). Give a folder saved by `save_pretrained`, or fill the hub's cache"
    )


@contextmanager
def _errors_only() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
