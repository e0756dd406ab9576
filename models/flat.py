"""Decoder layers in flat shards (torch's first FSDP, arXiv 2304.11277): the weights of one are a row, cut in equal pieces.

A layer is gathered while it runs. All that is not one of its own weights is whole on each device: what trains outside of the
layers, adapters, and blocks in between; the processes average its gradients at the end of a step. So one whose rows have no media
of a kind waits for nobody, and may leave out what the others run.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from models.flat_layer import Cut, FlatLayer, cut_of
from models.multimodal import MultiModalModel
from models.parallel import Reach

Sharding = Literal["FULL_SHARD", "SHARD_GRAD_OP"]
"""As torch calls it: a layer is let go of after its forward pass, or not before its backward pass."""


class _Root(nn.Module):
    """What torch's outermost wrapper sees: the layers alone, of all that a step runs."""

    def __init__(self, runs: nn.Module, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self._runs = (runs,)  # in a tuple: no child
        self.layers = nn.ModuleList(layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._runs[0](*args, **kwargs)


def flatten(module: nn.Module, model: MultiModalModel, device: torch.device, sharding: Sharding) -> nn.Module:
    """Cuts the layers of a built model into shards, in place and once, and moves what else there is to the device.

    One process alone has nothing to cut.

    Args:
        module: What runs the model.
        model: The model, whole, and the same on all processes.
        device: That of this process.
        sharding: When layers are let go of.

    Returns:
        What is to be called in the place of `module`.
    """
    layers = model.language_model.decoder_layers
    if isinstance(layers[0], FlatLayer):
        return layers[0].root[0]
    if dist.get_world_size() == 1:
        return module.to(device)
    cut = [main_kind(layer) for layer in layers]
    shapes = {weight: weight.shape for weights in cut for weight in weights}
    wrapped = [_wrapped(layer, weights, device, sharding) for layer, weights in zip(layers, cut, strict=True)]
    _mark(shapes)
    for number, layer in enumerate(wrapped):
        layers[number] = FlatLayer(layers[number], layer)
    model.to(device)  # the rest
    root = _wrapped(_Root(module, wrapped), (), device, sharding)
    root.check_is_root()  # settles it: a layer that ran alone would take itself for the root
    first = layers[0]
    assert isinstance(first, FlatLayer)
    first.root = (root,)
    first.register_forward_pre_hook(Reach(model), prepend=True, with_kwargs=True)
    return root


def main_kind(layer: nn.Module) -> list[nn.Parameter]:
    """Those weights of a layer that can be one row, of which there are most: of one type, and all of them frozen, or none.

    Adapters are not among them: some are switched on and off, which torch allows no part of a row.
    """
    kinds: dict[Any, list[nn.Parameter]] = {}
    for name, weight in layer.named_parameters():
        if "lora_" not in name:
            kinds.setdefault((weight.dtype, weight.requires_grad), []).append(weight)
    return max(kinds.values(), key=lambda weights: sum(weight.numel() for weight in weights))


def _wrapped(module: nn.Module, cut: Collection[nn.Parameter], device: torch.device, sharding: Sharding) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    others = set(module.parameters()).difference(cut)
    kind = ShardingStrategy[sharding]
    return FullyShardedDataParallel(module, sharding_strategy=kind, device_id=device, ignored_states=others, use_orig_params=True)


def _mark(shapes: Mapping[nn.Parameter, torch.Size]) -> None:
    """Notes on each weight which of its values are here: the processes have them in order."""
    numbers: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(numbers, [weight.numel() for weight in shapes])
    for index, (weight, shape) in enumerate(shapes.items()):
        vars(weight)["cut"] = Cut(shape, sum(of_rank[index] for of_rank in numbers[: dist.get_rank()]))


def average(weights: Iterable[Tensor]) -> None:
    """Averages the gradients of weights that are whole over all processes; one that a process lacks is 0."""
    gradients = []
    for weight in weights:
        if weight.requires_grad and cut_of(weight) is None:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    if gradients:
        torch._foreach_div_(gradients, dist.get_world_size())


@torch.no_grad()
def clip_flat(weights: Sequence[nn.Parameter], max_norm: float) -> None:
    """Scales all gradients down so that their norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    Of a weight in shards each process has other values; one that is whole has the same gradient on all of them.
    """
    trained = [(weight.grad, cut_of(weight)) for weight in weights if weight.grad is not None]
    shards = [gradient for gradient, cut in trained if cut is not None]
    others = [gradient for gradient, cut in trained if cut is None]
    square = get_total_norm(shards).to(weights[0].device) ** 2
    dist.all_reduce(square)
    norm = (square + get_total_norm(others).to(square) ** 2).sqrt()
    if trained:
        torch._foreach_mul_(shards + others, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # torch's own 1e-6


def whole_state(state: Mapping[int, Any], weights: Sequence[Tensor], is_first: bool) -> dict[int, dict[str, Any]]:
    """The state of an optimizer, whole; the processes must meet here.

    Args:
        state: By number of a weight what this process has of its state: nothing where it has nothing of the weight.
        weights: The weights.
        is_first: This process keeps the values; others only help.

    Raises:
        ValueError: The optimizer keeps what is not one number a value.
    """
    cuts = [cut_of(weight) for weight in weights]
    of_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_rank, {number: _kinds(state[number], weights[number]) for number in state if cuts[number]})
    kinds = {number: kinds for known in reversed(of_rank) for number, kinds in known.items()}
    whole: dict[int, dict[str, Any]] = {}
    for number, cut in enumerate(cuts):
        if cut is None:
            values = state.get(number, {})
        else:
            nothing = dict.fromkeys(kinds.get(number, {}), weights[number].new_empty(0))
            own = {**nothing, **state.get(number, {})}
            values = {
                name: cut.whole(own[name].to(kind)) if isinstance(kind, torch.dtype) else kind
                for name, kind in kinds.get(number, {}).items()
            }
        if values and is_first:
            whole[number] = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
    return whole


def _kinds(values: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """Of values that are shards the type; what else there is, such as the number of steps, itself."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        is_shard = isinstance(value, Tensor) and value.dim() > 0
        if is_shard and value.shape != weight.shape:
            raise ValueError(
                "trainer.strategy: FlatShardedStrategy cuts weights into shards without regard to their shape, and the optimizer "
                "keeps what is not one number a value: take one that treats each value by itself, such as AdamW, or "
                "configs/strategy/fsdp.yaml"
            )
        found[name] = value.dtype if is_shard else value.cpu() if isinstance(value, Tensor) else value
    return found


def own_state(state: Mapping[int, Any], weights: Mapping[int, Tensor]) -> dict[int, dict[str, Any]]:
    """What belongs to this process of a whole state; of a weight of which it has nothing it needs none."""
    own: dict[int, dict[str, Any]] = {}
    for number, values in state.items():
        cut, size = cut_of(weights[number]), weights[number].numel()
        if cut is None:
            own[number] = values
        elif size:
            own[number] = {
                name: cut.own(value, size) if isinstance(value, Tensor) and value.shape == cut.shape else value
                for name, value in values.items()
            }
    return own
