"""What of a part is trained: nothing, LoRA adapters, or everything."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from encoders.recompute import recompute_blocks

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), applied by PEFT.

    Args:
        r: Rank of the update.
        alpha: The update is scaled by alpha / r (with `use_rslora` by alpha / sqrt(r)).
        dropout: Dropout on the adapter's input.
        target_modules: Names of the linear layers to adapt, matched at the end of a module's full name.
        use_dora: Split the weight into magnitude and direction (Liu et al. 2024, arXiv 2402.09353).
        use_rslora: Rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
        init: `pissa` starts at the largest singular values of the weights, and takes these out of the frozen ones (Meng et al.
            2024, arXiv 2404.02948): the start is the same, but without its adapters the model is none that anybody trained. They
            are computed anew when a run goes on; a machine that rounds them differently is refused. None: an update of 0.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    use_dora: bool = False
    use_rslora: bool = False
    init: Literal["pissa"] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r is the rank of the adapters and must be at least 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must lie in [0, 1), got {self.dropout}")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty: name the linear layers to adapt, for example q_proj")


@dataclass(frozen=True)
class Tune:
    """What of a part is trained, and how fast.

    Args:
        mode: `frozen` trains nothing, `lora` trains adapters beside frozen weights, `full` trains every weight. What trains is
            float32, whatever the part's `dtype`: at usual learning rates most steps are too small to move a bfloat16 weight.
        lr: Learning rate of this part, where it is trained; None takes the optimizer's own.
        lora: The adapters, where `mode` is `lora`.
        activation_checkpointing: Keep the inputs of the part's blocks alone, and compute the rest again in the backward pass: the
            same numbers for a third more time and far less memory. Of use to a frozen part too, where gradients pass it.
    """

    mode: Literal["frozen", "lora", "full"] = "full"
    lr: float | None = None
    lora: LoRA = field(default_factory=LoRA)
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"tune.lr must be above 0, got {self.lr}: to train nothing, set tune.mode to frozen")
        if self.lr is not None and self.mode == "frozen":
            raise ValueError(
                f"tune.lr is {self.lr}, but tune.mode frozen trains nothing: set tune.mode to lora or full, or tune.lr to null"
            )


def apply_tune(tune: Tune, module: nn.Module, part: str, but: Collection[str] = ()) -> None:
    """Freezes, adapts or frees `module`, in place.

    What trains becomes float32: with `full` the whole module, buffers included, with `lora` the adapters alone.

    Args:
        tune: What to train.
        module: The weights of the part.
        part: Name of the part, for the error.
        but: Names of modules within it that get no adapters.

    Raises:
        ValueError: `lora.target_modules` matches no layer, or one that cannot be adapted, or there are no blocks whose
            activations could be computed again.
    """
    module.requires_grad_(tune.mode == "full")
    if tune.mode == "full":
        module.to(torch.float32)
    if tune.mode == "lora":
        _add_adapters(tune.lora, module, part, but)
    if tune.activation_checkpointing:
        recompute_blocks(module, part, but)


def _add_adapters(lora: LoRA, module: nn.Module, part: str, but: Collection[str]) -> None:
    from peft import inject_adapter_in_model  # 5 CPU-seconds to import: only where it is used

    spared = tuple(f"{name}." for name in but)
    layers = {name: layer for name, layer in module.named_modules() if not f"{name}.".startswith(spared)}
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            linear = sorted({name.rsplit(".", 1)[-1] for name, layer in layers.items() if isinstance(layer, nn.Linear)})
            raise ValueError(
                f"{part}: lora.target_modules names {target!r}, but no layer of the model has that name. "
                f"Its linear layers are called: {', '.join(linear) or 'none'}"
            )
    try:
        inject_adapter_in_model(lora_config(lora, lora.target_modules, but), module)
    except ValueError as error:
        raise ValueError(f"{part}: lora.target_modules {list(lora.target_modules)} cannot be adapted: {error}") from error
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def lora_config(lora: LoRA, layers: Collection[str], but: Collection[str] = ()) -> "LoraConfig":
    """What PEFT makes adapters of.

    Args:
        lora: The options.
        layers: Ends of the names of the layers to adapt.
        but: Names of modules within which there are to be none.
    """
    from peft import LoraConfig

    from encoders.lora_linear import lora_linear

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by it: any number does
        lora_dropout=lora.dropout,
        target_modules=list(layers),
        exclude_modules="|".join(rf"{re.escape(name)}(\..*)?" for name in but) or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=lora.init or True,
    )
    config._register_custom_module({nn.Linear: lora_linear})  # type: ignore[dict-item]  # PEFT calls it, and takes None for a no
    return config


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a parameter as torch makes it, neither sharded nor quantised; with values, or without (`planning`)."""
    return type(weight) in (nn.Parameter, FakeTensor)
