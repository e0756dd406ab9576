"""One step of training on a batch, without values: what it allocates, and how many operations it takes."""

import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from datamodules.batch import MODALITIES, Batch
from encoders.base import Part
from models.language import LanguageModel
from models.view import View
from planning.allocations import Allocations
from planning.gradients import STATES, DroppedGradients, Gradients, OffloadedGradients, apart
from planning.outline import Outline
from planning.placement import ONE_DEVICE, Placement, share
from planning.zero import ZeroGradients


@dataclass(frozen=True)
class StepCost:
    """What a micro-batch takes, forward and backward, in the middle of training.

    Args:
        at_peak: Bytes that it allocates, when these are the most, by kind; with gradients and the optimizer's state.
        flops: Floating-point operations.
        on_host: Bytes of gradients and the optimizer's state that a device has in the memory of the machine, by kind.
    """

    at_peak: Counter[str]
    flops: int
    on_host: Counter[str]


def run_step(
    outline: Outline,
    batch: Batch,
    precision: Precision,
    accumulates: bool = False,
    placement: Placement = ONE_DEVICE,
    on_cpu: bool = False,
) -> StepCost:
    """Runs a step, after another one: gradients of that are there until the backward pass begins, states from then on.

    Args:
        outline: The module.
        batch: The batch, of real tensors or fake ones.
        precision: Lightning's plugin.
        accumulates: A step has several batches: this is its last one.
        placement: How the model is spread over devices, which says what a device has of gradients and states.
        on_cpu: It is to run on a CPU, where optimizers take one weight after the other.

    Raises:
        ValueError: A part does what cannot be done without values.
    """
    module = outline.module
    allocations = Allocations(outline.mode, module.model.language_model.config.get_text_config().vocab_size)
    allocations.forget([*module.parameters(), *module.buffers()])
    gradients = _gradients(outline, allocations, accumulates, placement, on_cpu)
    batch = _faked(precision.convert_input(batch), outline, allocations)
    hooks = [hook for name, part in module.parts().items() for hook in _name_kind(allocations, name, part)]
    gradients.update()
    states = allocations.held[STATES]
    try:
        with allocations:
            with gradients.forward(), precision.forward_context():
                result = module.step(batch, "train")
            assert result is not None, "the batch has rows"
            gradients.begin()
            with allocations.kept_for("backward pass"):
                result[0].sum().backward()  # an objective may have several terms
            gradients.end()
    except RuntimeError as error:  # of many kinds, where a number is asked of a tensor without values
        raise ValueError(_where_it_stops(error, allocations)) from error
    for hook in hooks:
        hook.remove()
    at_peak = apart(allocations.at_peak, states) + gradients.beside
    at_peak["batch"] = sum(x.untyped_storage().nbytes() for x in tree_flatten(batch)[0] if isinstance(x, Tensor))
    gradients.optimizer.zero_grad()
    return StepCost(at_peak, allocations.flops, gradients.on_host)


def _gradients(outline: Outline, allocations: Allocations, accumulates: bool, placement: Placement, on_cpu: bool) -> Gradients:
    if placement.offload:
        return OffloadedGradients(outline, allocations, accumulates, True, share(outline, placement))
    if placement.zero is None:
        kind = Gradients if placement.flat is None else DroppedGradients
        return kind(outline, allocations, accumulates, on_cpu, share(outline, placement))
    is_on_cpu = on_cpu or placement.zero.offload_optimizer
    return ZeroGradients(outline, allocations, accumulates, is_on_cpu, zero=placement.zero, number=placement.replicas)


def _where_it_stops(error: RuntimeError, allocations: Allocations) -> str:
    """Why a step cannot be run on shapes alone: in which part, and at which line of it."""
    passed = (Path(torch.__file__).parent, Path(__file__).parent)
    frames = [x for x in traceback.extract_tb(error.__traceback__) if not any(map(Path(x.filename).is_relative_to, passed))]
    at = "".join(f" at {last.filename}:{last.lineno} (`{last.line}`), in the {allocations.kind}" for last in frames[-1:])
    reason = next(iter(str(error).splitlines()), "")
    return (
        f"plan runs a step on tensors without values, which stops{at}: {reason}. If a fit does not stop there, a number is read "
        "off such a tensor, as float(x), x.numpy() or x[mask] do: keep it a tensor, or go without a plan"
    )


def _faked(batch: Batch, outline: Outline, allocations: Allocations) -> Any:
    """A batch whose pixels and sounds have no values."""

    def fake(x: Any) -> Any:
        has_content = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1
        return outline.mode.from_tensor(x) if has_content else x  # positions are counted from what is a number of each medium

    faked = {name: tree_map(fake, value) if name in MODALITIES else value for name, value in batch.items()}
    allocations.forget(x for x in tree_flatten(faked)[0] if isinstance(x, Tensor))
    return faked


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
