"""One step of training on a batch, without values: what it allocates, and how many operations it takes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_map

from datamodules.batch import MODALITIES, Batch
from encoders.base import Part
from lightning_modules.optim import parameter_groups
from models.language import LanguageModel
from models.view import View
from planning.allocations import GRADIENTS, Allocations
from planning.outline import Outline

STATES, UPDATE = "optimizer states", "the optimizer's step"


@dataclass(frozen=True)
class StepCost:
    """What a micro-batch takes, forward and backward, in the middle of training.

    Args:
        at_peak: Bytes that it allocates, when these are the most, by kind; with gradients and the optimizer's state.
        flops: Floating-point operations.
    """

    at_peak: Counter[str]
    flops: int


def precision_of(name: Any) -> Precision:
    """Lightning's plugin of `trainer.precision`.

    Raises:
        ValueError: It is not known here.
    """
    match str(name or "32-true"):
        case "32" | "32-true":
            return Precision()
        case "bf16" | "bf16-mixed":
            return MixedPrecision("bf16-mixed", "cpu")
        case "16" | "16-mixed":
            return MixedPrecision("16-mixed", "cpu")
        case "bf16-true":
            return HalfPrecision("bf16-true")
        case "16-true":
            return HalfPrecision("16-true")
    raise ValueError(f"trainer.precision is {name}: plan knows 32-true, bf16-mixed, 16-mixed, bf16-true and 16-true")


def run_step(
    outline: Outline, batch: Batch, precision: Precision, accumulates: bool = False, share: float = 1.0, on_cpu: bool = False
) -> StepCost:
    """Runs a step, after another one: gradients of that are there until the backward pass begins, states from then on.

    Args:
        outline: The module.
        batch: The batch, of real tensors or fake ones.
        precision: Lightning's plugin.
        accumulates: A step has several batches: this is its last one.
        share: What a device has of gradients and states.
        on_cpu: It is to run on a CPU, where optimizers take one weight after the other.
    """
    module = outline.module
    allocations = Allocations(outline.mode, module.model.language_model.config.get_text_config().vocab_size)
    allocations.forget([*module.parameters(), *module.buffers()])
    trainable = [weight for weight in outline.weights if weight.requires_grad]
    optimizer: Optimizer = module.optimizer(parameter_groups(module.parts()))
    batch = _faked(precision.convert_input(batch), outline, allocations)
    hooks = [hook for name, part in module.parts().items() for hook in _name_kind(allocations, name, part)]
    with allocations:
        with allocations.kept_for(GRADIENTS, share), outline.mode:
            for weight in trainable:
                weight.grad = weight.new_empty(weight.shape)
        allocations.watch_gradients(trainable, share)
        _update(optimizer, allocations, share, on_cpu)
        states = allocations.held[STATES]
        with precision.forward_context():
            result = module.step(batch, "train")
        assert result is not None, "the batch has rows"
        if not accumulates:
            optimizer.zero_grad()
        with allocations.kept_for("backward pass"):
            result[0].sum().backward()  # an objective may have several terms
    for hook in hooks:
        hook.remove()
    at_peak = allocations.at_peak.copy()
    at_peak[UPDATE] = at_peak[STATES] - states
    at_peak[STATES] = states
    at_peak["batch"] = sum(x.untyped_storage().nbytes() for x in tree_flatten(batch)[0] if isinstance(x, Tensor))
    optimizer.zero_grad()
    return StepCost(Counter({kind: round(size) for kind, size in at_peak.items() if round(size) > 0}), allocations.flops)


def _faked(batch: Batch, outline: Outline, allocations: Allocations) -> Any:
    """A batch whose pixels and sounds have no values."""

    def fake(x: Any) -> Any:
        return outline.mode.from_tensor(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    faked = {name: tree_map(fake, value) if name in MODALITIES else value for name, value in batch.items()}
    allocations.forget(x for x in tree_flatten(faked)[0] if isinstance(x, Tensor))
    return faked


def _update(optimizer: Optimizer, allocations: Allocations, share: float, on_cpu: bool) -> None:
    """Steps an optimizer: off a CPU with all weights at once where it may; a fused one needs nothing besides its state."""
    is_fused = False
    for group in optimizer.param_groups:
        if group.get("fused"):
            group["fused"], is_fused = False, True
        elif "foreach" in group and group["foreach"] is None:
            group["foreach"] = not on_cpu
    with allocations.kept_for(STATES, share):
        optimizer.step()
    if is_fused:
        allocations.forget_peak()


def _name_kind(allocations: Allocations, name: str, part: Part) -> list[Any]:
    """Lets what a part allocates in its forward pass count as its activations."""
    module: nn.Module = part
    if isinstance(part, View):
        module = part.module
    elif isinstance(part, LanguageModel):
        module = part.model.base_model

    def enter(*_: Any) -> None:
        allocations.enter(f"activations of {name}")

    def leave(*_: Any) -> None:
        allocations.leave()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
