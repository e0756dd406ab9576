"""A model spread over processes: its layers sharded (FSDP2), or each of them split across its width (tensor parallelism).

FSDP2 (arXiv 2304.11277, with a shard of each weight instead of a flat one) keeps a shard of each decoder layer on each device;
the layer is gathered while it runs. Outside of the layers, what trains is sharded and gathered from the beginning of a step to
its end, and what is frozen stays whole: a step needs it from beginning to end anyway, and a process whose rows have no media of
a kind waits for nobody. Tensor parallelism (arXiv 1909.08053) splits the heads of attention and the feed-forward layer; all else
is computed alike on all devices of a group.
"""

from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.flat_layer import cut_of
from models.language import LanguageModel
from models.multimodal import MultiModalModel
from models.spread import has_shares, is_spread, local

Style = Literal["colwise", "rowwise", "replicated_with_grad_allreduce"]
"""As transformers calls it: a linear layer whose outputs, or inputs, are split, and weights that see the own heads alone."""
STYLES: set[str] = {"colwise", "rowwise", "replicated_with_grad_allreduce"}


def parallelize(model: MultiModalModel, mesh: DeviceMesh, offload: bool = False) -> None:
    """Spreads a built model, in place, as the two sizes of the mesh say.

    Args:
        model: The model, the same on all processes.
        mesh: With the dimensions `data_parallel`, over which layers are sharded, and `tensor_parallel`, which splits them.
        offload: Keep the shards in the memory of the machine.

    Raises:
        ValueError: Its weights are quantised, or its language model cannot be split.
    """
    check_not_quantised(model)
    if mesh["tensor_parallel"].size() > 1:
        split(model.language_model, mesh["tensor_parallel"])
    if mesh["data_parallel"].size() > 1:
        shard(model, mesh["data_parallel"], offload)


def check_not_quantised(model: MultiModalModel) -> None:
    """Refuses weights of fewer bits: neither a shard nor a part of one can be decoded.

    Raises:
        ValueError: There are some.
    """
    if quantised := [name for name, weight in model.named_parameters() if not weight.is_floating_point()]:
        raise ValueError(
            f"trainer.strategy: {len(quantised)} weights are quantised, such as {quantised[0]}, and cannot be sharded or split: "
            "load the language model without quantisation, or take configs/strategy/ddp.yaml, which keeps it whole on each device"
        )


def shard(model: MultiModalModel, mesh: DeviceMesh, offload: bool) -> None:
    """Shards the decoder's layers and, outside of them, what trains."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

    # pages that stay in place, from which a GPU reads faster
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    layers = model.language_model.decoder_layers
    for layer in layers:
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    inside = set(layers.parameters())
    kept = {weight for weight in model.parameters() if not weight.requires_grad and weight not in inside}
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=kept, offload_policy=policy)
    register_fsdp_forward_method(model, "generate")
    layers[0].register_forward_pre_hook(Reach(model), prepend=True, with_kwargs=True)


def gather(model: MultiModalModel) -> None:
    """Gathers what trains outside of the layers, until the next backward pass is over; all processes must meet here."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.unshard()


def release(model: MultiModalModel) -> None:
    """Gives back what `gather` has gathered for a forward pass that is not made."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def is_sharded(model: MultiModalModel) -> bool:
    """Whether processes wait for each other in each forward pass, and so must make equally many."""
    return has_shares(model.language_model.decoder_layers[0])


class Reach:
    """The hook of the first layer: adds 0 to what enters it, with a gradient of 0 for all that trains outside of the layers.

    So each process offers gradients of the same weights in the same order, whatever media its rows have.
    """

    def __init__(self, model: MultiModalModel) -> None:
        self.model = model

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        weights = [
            weight for weight in self.model.parameters() if weight.requires_grad and not is_spread(weight) and not cut_of(weight)
        ]
        hidden_BTD = sum((weight.flatten()[:0].sum().to(hidden_BTD.dtype) for weight in weights), hidden_BTD)
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_BTD})


def tensor_plan(language_model: LanguageModel) -> dict[str, Style]:
    """How the modules of a decoder layer are split, by their names in the layer: what transformers knows of the family.

    Raises:
        ValueError: It knows nothing, or a way that is not supported here.
    """
    config = language_model.config.get_text_config()
    known: dict[str, Any] = config.base_model_tp_plan or {}
    plan = {name.removeprefix("layers.*."): style for name, style in known.items() if name.startswith("layers.*.")}
    others = {name: style for name, style in plan.items() if style not in STYLES}
    if not plan or others:
        why = f"splits {next(iter(others))} by {next(iter(others.values()))}" if others else "has no plan of how to split it"
        raise ValueError(
            f"trainer.strategy: the layers of {language_model.name_or_path} ({config.model_type}) cannot be split across "
            f"devices: transformers {why}, and llama, mistral, qwen2, qwen3, gemma2 and families like them are supported. Set "
            "tensor_parallel_size to 1: configs/strategy/fsdp.yaml shards the layers of any model"
        )
    return plan


def split(language_model: LanguageModel, mesh: DeviceMesh) -> None:
    """Splits the decoder's layers across their width, adapters included."""
    from torch.distributed.tensor.parallel import parallelize_module

    check_split(language_model, mesh.size())
    for layer in language_model.decoder_layers:
        parallelize_module(layer, mesh, split_styles(language_model, layer))


def check_split(language_model: LanguageModel, size: int) -> None:
    """Refuses to split the layers of a language model, which need not be built, between so many devices.

    Raises:
        ValueError: They cannot be, or not between so many.
    """
    tensor_plan(language_model)
    config = language_model.config.get_text_config().to_dict()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = config.get(name)
        if number is not None and number % size:
            raise ValueError(
                f"trainer.strategy: tensor_parallel_size {size} does not divide the {number} {name} of "
                f"{language_model.name_or_path}: take a size that does"
            )


def split_styles(language_model: LanguageModel, layer: nn.Module) -> dict[str, Any]:
    """How the linear layers of a built decoder layer are split, by their names in it; adapters are among them.

    Raises:
        ValueError: One has adapters that cannot be split.
    """
    styles: dict[str, Any] = {}
    for name, style in tensor_plan(language_model).items():
        styles |= _styles(name, layer.get_submodule(name), style)
    return styles


def _styles(name: str, module: nn.Module, style: Style) -> dict[str, Any]:
    """How a module is split, by the names of its own linear layers: where it has adapters, these are."""
    from peft.tuners.lora import LoraLayer
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if style == "replicated_with_grad_allreduce":
        return {}
    how = ColwiseParallel if style == "colwise" else RowwiseParallel
    if not isinstance(module, LoraLayer):
        return {name: how()}
    if module.lora_magnitude_vector:
        raise ValueError(
            f"trainer.strategy: {name} has DoRA adapters, whose magnitudes need the whole weight, so it cannot be split across "
            "devices: set language_model.tune.lora.use_dora to false, or tensor_parallel_size to 1"
        )
    # x A B: A has the inputs of the layer, B its outputs; the narrow side between them is whole everywhere
    end = module.lora_B if style == "colwise" else module.lora_A
    kind = "lora_B" if style == "colwise" else "lora_A"
    return {f"{name}.base_layer": how()} | {f"{name}.{kind}.{adapter}": how() for adapter in end}


def add_up_own_heads(language_model: LanguageModel, mesh: DeviceMesh) -> None:
    """Adds up the gradients of weights that are whole on each device, but of which each has seen its own heads alone (Qwen3)."""
    if mesh["tensor_parallel"].size() == 1:
        return
    names = [name for name, style in tensor_plan(language_model).items() if style == "replicated_with_grad_allreduce"]
    group = mesh["tensor_parallel"].get_group()
    for layer in language_model.decoder_layers:
        for name in names:
            for weight in layer.get_submodule(name).parameters():
                if weight.grad is not None:
                    dist.all_reduce(local(weight.grad), group=group)
