"""Where a run keeps the features of its frozen encoders, and under which keys: what they depend on besides the medium."""

import hashlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.batch import Modality
from datamodules.cache import CacheOptions
from datamodules.cache_keys import code_of, hash_of, versions
from datamodules.cached_media import FeatureStore
from datamodules.processor import Processor
from encoders.base import Encoder, Part
from models.multimodal import MultiModalModel


def share_features(model: MultiModalModel, processor: Processor, options: CacheOptions | None, trainer: Trainer) -> None:
    """Lets the data side look for features, which begins when its loaders start: the weights are loaded by then.

    Args:
        model: The model; it need not be built yet.
        processor: The data side's way to the model.
        options: Where features are kept; None: nowhere.
        trainer: Of the run.
    """
    model.frozen_features.num_read = model.frozen_features.num_encoded = 0
    processor.features = None if options is None else cache(lambda: open_features(model, options, trainer))


def open_features(model: MultiModalModel, options: CacheOptions, trainer: Trainer) -> FeatureStore:
    """Opens the cache of a run, once its weights are final, and lets the model write to it.

    Args:
        model: The model, built.
        options: Where the cache lies.
        trainer: Of the run; the features depend on its device and precision too.

    Raises:
        ValueError: The cache cannot be used.
    """
    tensors = options.open()
    model.frozen_features.cache = tensors
    way = arithmetic(trainer.strategy.root_device, str(trainer.precision))
    encoders: dict[Modality, str] = {}
    for modality, (encoder, _) in model.towers().items():
        if encoder.has_frozen_features:
            encoders[modality] = hash_of(encoder_hash(encoder), way)
        else:
            rank_zero_warn(
                f"model.feature_cache: what {modality}_encoder computes first is trained, so its features change from step to "
                "step and are not kept"
            )
    return FeatureStore(tensors, encoders)


def report(model: MultiModalModel) -> None:
    """Says what the cache of a run was good for."""
    features = model.frozen_features
    if features.cache is not None and features.num_read + features.num_encoded:
        rank_zero_info(f"feature cache: features of {features.num_read:,} media were read, of {features.num_encoded:,} computed")


def arithmetic(device: torch.device, precision: str) -> list[Any]:
    """How numbers are computed, as far as it decides their last bits: results are shared only where this is the same."""
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return [device.type, threads, precision, torch.get_float32_matmul_precision()]


def encoder_hash(encoder: Encoder) -> str:
    """A hash of all that the features of a frozen encoder depend on besides the medium: options, structure, code, weights.

    Each bit of each frozen weight counts. A weight that trains does not: the features do not depend on it.
    """
    modules = [(name, module) for name, module in encoder.named_modules()]
    structure = [
        [name, f"{type(module).__module__}.{type(module).__qualname__}", module.extra_repr(), _numbers_of(module)]
        for name, module in modules
    ]
    own = {kind.__module__ for _, module in modules for kind in type(module).__mro__}
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in _frozen_tensors(encoder):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hash_of(_untuned(encoder.spec()), structure, code_of(*sorted(own)), versions(), digest.hexdigest())


def _frozen_tensors(part: Part, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Frozen weights, and the buffers of what does not train as a whole, whose running statistics would change."""
    nested = part.nested_parts()
    yield from ((prefix + name, weight) for name, weight in part.own_named_parameters() if not weight.requires_grad)
    if part.tune.mode != "full":
        others = tuple(f"{name}." for name in nested)
        yield from ((prefix + name, buffer) for name, buffer in part.named_buffers() if not name.startswith(others))
    for name, child in nested.items():
        yield from _frozen_tensors(child, f"{prefix}{name}.")


def _numbers_of(module: torch.nn.Module) -> dict[str, Any]:
    """What a module has noted of its configuration, such as a number of heads or a scale; not what it notes while it runs."""
    noted = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return {name: value for name, value in noted.items() if name != "training" and not name.startswith("_")}


def _untuned(spec: Any) -> Any:
    """A spec without how its parts are trained."""
    if isinstance(spec, dict):
        return {name: _untuned(value) for name, value in spec.items() if name != "tune"}
    return spec
