"""On how many devices a model stands, and how it is spread over them."""

import pydoc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn

from lightning_modules.flat_shards import FlatPrecision, FlatShardedStrategy
from lightning_modules.optim import check_takes_shares, parameter_groups, weights_of
from lightning_modules.strategies import ShardedStrategy, check_at_a_time
from lightning_modules.zero import ZeroPrecision, ZeroStrategy
from models.flat import Sharding, main_kind
from models.language import LanguageModel
from models.parallel import check_not_quantised, split_styles
from planning.outline import Outline
from planning.precision import precision_of
from planning.zero import GATHERED, Zero, gathered


@dataclass(frozen=True)
class Placement:
    """How a model is spread over devices.

    Args:
        replicas: Devices, or groups of these, that read rows of their own.
        split: Devices of a group, which split each layer between them (tensor parallelism).
        is_sharded: The replicas hold a shard of each layer, of its gradients and of the optimizer's state each (FSDP2).
        offload: Their shards are in the memory of the machine.
        flat: Of each layer those weights alone, in flat shards, and when a layer is let go of (torch's first FSDP).
        has_buckets: Gradients are copied to be summed up (DDP without `gradient_as_bucket_view`).
        zero: What DeepSpeed's ZeRO keeps where; of stage 3 `is_sharded`, too.
    """

    replicas: int = 1
    split: int = 1
    is_sharded: bool = False
    offload: bool = False
    flat: Sharding | None = None
    has_buckets: bool = False
    zero: Zero | None = None

    @property
    def has_host_shards(self) -> bool:
        """Whether the shards of weights are in the memory of the machine."""
        return self.offload or (self.zero is not None and self.zero.offload_parameters)

    def __str__(self) -> str:
        ways = []
        if self.zero is not None:
            ways.append(f"ZeRO-{self.zero.stage} over {self.replicas}")
        elif self.replicas > 1:
            sharded = f"FSDP{2 if self.flat is None else 1} over {self.replicas}"
            ways.append(sharded if self.is_sharded else f"DDP, {self.replicas} replicas")
        if self.split > 1:
            ways.append(f"each layer split in {self.split}")
        return ", ".join(ways) or "one device"


ONE_DEVICE = Placement()


def placement_of(trainer: Namespace, world_size: int | None = None) -> Placement:
    """How the options of a trainer spread a model.

    Args:
        trainer: The options.
        world_size: Number of devices; None: as the options say, where `auto` is those of this machine.

    Raises:
        ValueError: The strategy is not known here, or does not fit the number of devices.
    """
    if world_size is None:
        world_size = _num_devices(trainer.devices) * (trainer.num_nodes or 1)
    strategy = trainer.strategy or "auto"
    name, options = (strategy.class_path, strategy.get("init_args")) if isinstance(strategy, Namespace) else (strategy, None)
    if name == "auto" or name.startswith("ddp"):
        return Placement(world_size, has_buckets=world_size > 1)
    cls: Any = pydoc.locate(name) or pydoc.locate(f"lightning.pytorch.strategies.{name}")
    if isinstance(cls, type) and issubclass(cls, DDPStrategy) and not issubclass(cls, DeepSpeedStrategy):
        has_view = bool(options and options.get("gradient_as_bucket_view"))
        return Placement(world_size, has_buckets=world_size > 1 and not has_view)
    if isinstance(cls, type) and issubclass(cls, ShardedStrategy):
        return _sharded(options or Namespace(), world_size, trainer.num_nodes or 1)
    if isinstance(cls, type) and issubclass(cls, FlatShardedStrategy):
        FlatPrecision(precision_of(trainer.get("precision")).precision, "cpu")
        sharding = (options or Namespace()).get("sharding_strategy", "FULL_SHARD")
        return Placement(world_size, is_sharded=world_size > 1, flat=sharding)
    if isinstance(cls, type) and issubclass(cls, ZeroStrategy):
        names = ("stage", "offload_optimizer", "offload_parameters", "reduce_bucket_size")
        zero = Zero(**{name: options[name] for name in names if options is not None and name in options})
        ZeroPrecision(precision_of(trainer.get("precision")).precision)
        return Placement(world_size, is_sharded=zero.stage == 3, zero=zero)
    if isinstance(cls, type) and issubclass(cls, SingleDeviceStrategy):
        return Placement()
    raise ValueError(
        f"trainer.strategy is {name}, of which plan does not know what it keeps where: it knows those of configs/strategy (DDP, "
        "FSDP2, tensor parallelism, ZeRO by ZeroStrategy), FlatShardedStrategy and one device"
    )


def _sharded(options: Namespace, world_size: int, num_nodes: int) -> Placement:
    split, groups = options.get("tensor_parallel_size", 1), options.get("data_parallel_size", "auto")
    split = max(1, world_size // num_nodes) if split == "auto" else split
    groups = world_size // split if groups == "auto" else groups
    if groups * split != world_size:
        raise ValueError(
            f"trainer.strategy: {world_size} devices cannot be {groups} groups (data_parallel_size) of {split} "
            "(tensor_parallel_size): the product must be the number of devices; --world_size says how many there will be"
        )
    return Placement(groups, split, is_sharded=groups > 1, offload=options.get("offload", False) and groups > 1)


def _num_devices(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([one for one in devices.split(",") if one.strip()])
    number = -1 if devices in ("auto", None) else int(devices)
    return max(1, torch.cuda.device_count()) if number == -1 else number


def check_placement(outline: Outline, placement: Placement, precision: Precision | None = None) -> None:
    """Refuses what training refuses.

    Args:
        outline: The module.
        placement: How it is to be spread.
        precision: Lightning's plugin; None: that of 32-true.

    Raises:
        ValueError: A model cannot be spread so.
    """
    if not (placement.is_sharded or placement.split > 1 or placement.zero is not None):
        return
    outline.module.check_spread(placement.zero is not None)
    check_not_quantised(outline.module.model)
    split = _split_weights(outline.module.model.language_model) if placement.split > 1 else set()
    layers = _layers(outline, placement)
    optimizer = outline.module.optimizer(parameter_groups(outline.module.parts()))
    if placement.zero is not None or any(x in split or _is_shard(x, layers, placement) for x in weights_of(optimizer)):
        check_takes_shares(optimizer)
    if placement.split > 1:
        check_at_a_time(optimizer, lambda weight: weight in split, precision or precision_of(None), placement.split)


def _split_weights(language_model: LanguageModel) -> set[nn.Parameter]:
    """The weights that tensor parallelism splits."""
    layers = language_model.decoder_layers
    modules = (layer.get_submodule(name) for layer in layers for name in split_styles(language_model, layer))
    return {weight for module in modules for weight in module.parameters()}


def share(outline: Outline, placement: Placement) -> float:
    """What of its gradients, and of the optimizer's state, a device has, all in all."""
    if not placement.is_sharded:
        return 1.0
    trained, layers = [weight for weight in outline.weights if weight.requires_grad], _layers(outline, placement)
    cut = sum(outline.num_bytes(weight) for weight in trained if _is_shard(weight, layers, placement))
    return 1 - cut / sum(map(outline.num_bytes, trained)) * (1 - 1 / placement.replicas)


def held_bytes(outline: Outline, placement: Placement) -> Counter[str]:
    """What a device holds at all times: weights by part, and what the strategy itself needs.

    Under FSDP two layers are gathered at a time, the one that runs and the next, and their gradients are whole until they are
    scattered; under FSDP2 what trains outside of the layers is whole during a step. Of ZeRO-3 see `planning.zero.gathered`.
    """
    layers = _layers(outline, placement)
    held: Counter[str] = Counter()
    whole = 0
    for weight, part in outline.weights.items():
        size, is_shard = outline.num_bytes(weight), _is_shard(weight, layers, placement)
        held[part] += 0 if is_shard and placement.has_host_shards else round(size / placement.replicas) if is_shard else size
        whole += size if is_shard and not any(weight in layer for layer in layers) else 0
    held["buffers"] = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in outline.module.buffers()}.values())
    if placement.zero is not None and placement.is_sharded:
        held[GATHERED] = whole + gathered([[(x.numel(), outline.num_bytes(x)) for x in layer] for layer in layers])
    elif placement.is_sharded:
        sizes = [sum(outline.num_bytes(x) for x in layer) for layer in layers]
        gradients = [sum(outline.num_bytes(x) for x in layer if x.requires_grad) for layer in layers]
        is_kept = placement.flat == "SHARD_GRAD_OP"
        held[GATHERED] = whole + (sum(sizes) if is_kept else 2 * max(sizes)) + 2 * max(gradients)
    if placement.has_buckets:
        held["DDP's buckets"] = sum(outline.num_bytes(weight) for weight in outline.weights if weight.requires_grad)
    return held


def host_bytes(outline: Outline, placement: Placement) -> int:
    """Bytes of its weights that a device has in the memory of the machine."""
    if not placement.has_host_shards:
        return 0
    layers = _layers(outline, placement)
    shards = [outline.num_bytes(weight) for weight in outline.weights if _is_shard(weight, layers, placement)]
    return sum(shards) // placement.replicas


def _layers(outline: Outline, placement: Placement) -> list[set[nn.Parameter]]:
    """The weights of each decoder layer that are gathered together."""
    layers = outline.module.model.language_model.decoder_layers
    return [set(layer.parameters() if placement.flat is None else main_kind(layer)) for layer in layers]


def _is_shard(weight: nn.Parameter, layers: Sequence[set[nn.Parameter]], placement: Placement) -> bool:
    is_inside = any(weight in layer for layer in layers)
    return placement.is_sharded and (is_inside or (weight.requires_grad and placement.flat is None))
