"""What to change in a configuration whose run does not fit on its device."""

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from encoders.audio_base import AudioEncoder
from encoders.base import Encoder
from encoders.image_base import ImageEncoder
from encoders.tuning import Tune
from models.language import LanguageModel
from models.pretrained import PretrainedMLLM
from planning.placement import Placement
from planning.run import Plan, Run, plan_run
from planning.zero import MASTERS, Zero

Change = tuple[str, Run]
"""Flags of the command line, and the run with them."""

LEAST_GAIN = 0.02
"""A change that saves a smaller share of the memory is not worth its flag."""

_HELD = ("weights", "optimizer", "gradients", "DDP", "gathered", MASTERS)


@dataclass(frozen=True)
class Advice:
    """A change, on top of those before it.

    Args:
        flags: What to add to the command line.
        total: Bytes on a device at the peak with it.
        fits: Whether the device has as much.
    """

    flags: str
    total: int
    fits: bool


@dataclass(frozen=True)
class Refused:
    """A change that would be refused, as training would.

    Args:
        flags: What not to add to the command line.
        why: The refusal.
    """

    flags: str
    why: str


def advise(run: Run, plan: Plan) -> tuple[list[Advice], list[Refused]]:
    """Changes that together let a run fit, those first that touch what takes most; all that help where they do not suffice.

    A feature cache is none of them: it is empty in the first epoch, which is the one that is planned.

    Args:
        run: A run.
        plan: Its plan.

    Returns:
        The changes, and those that were looked at and are refused.
    """
    advice: list[Advice] = []
    refused: dict[str, str] = {}
    while not plan.fits(run.device) and (taken := _first_that_helps(run, plan, refused)) is not None:
        flags, run, plan = taken
        advice.append(Advice(flags, plan.total, plan.fits(run.device)))
    return advice, [Refused(flags, why) for flags, why in refused.items()]


def _first_that_helps(run: Run, plan: Plan, refused: dict[str, str]) -> tuple[str, Run, Plan] | None:
    of_weights = sum(size for kind, size in plan.memory.items() if kind.startswith(_HELD))
    kinds = [_less_activations(run, plan), _smaller_weights(run)]
    for kind in kinds[::-1] if of_weights > plan.total / 2 else kinds:
        for flags, changed in kind:
            if flags in refused:
                continue
            try:
                planned = plan_run(changed)
            except ValueError as error:  # such as that of a network without blocks that could be computed again
                refused[flags] = str(error)
                continue
            if planned.total < (1 - LEAST_GAIN) * plan.total:
                return flags, changed, planned
    return None


def _smaller_weights(run: Run) -> Iterator[Change]:
    """Fewer bytes at rest: first what changes no number, then what changes few, then what changes the method."""
    language_model, placement = run.model.model.language_model, run.placement
    is_spread = placement.is_sharded or placement.split > 1 or placement.zero is not None
    is_frozen = language_model.tune.mode != "full"
    if placement.replicas > 1 and not is_spread and language_model.quantize is None:
        sharded = replace(placement, is_sharded=True, has_buckets=False)
        yield "--config configs/strategy/fsdp.yaml", replace(run, placement=sharded)
    if placement.is_sharded and placement.zero is None and placement.flat is None and not placement.offload:
        yield "--trainer.strategy.offload true", replace(run, placement=replace(placement, offload=True))
    if placement.zero is not None:
        yield from _smaller_shares(run, placement, placement.zero)
    if is_frozen and language_model.dtype == "float32" and language_model.quantize is None:
        yield "--model.language_model.dtype bfloat16", _with_options(run, "language_model", dtype="bfloat16")
    for name, part in run.model.parts().items():
        if isinstance(part, ImageEncoder | AudioEncoder) and part.dtype is torch.float32 and part.tune.mode != "full":
            yield f"--model.{name}.dtype bfloat16", _with_options(run, name, dtype=torch.bfloat16)
    optimizer = run.model.optimizer([nn.Parameter(torch.zeros(1))])
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    if is_adamw and not is_frozen and not is_spread and importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes.optim import AdamW8bit

        eight_bits = replace(run, model=copy.deepcopy(run.model))
        eight_bits.model.optimizer = AdamW8bit
        kept = " ".join(f"--model.optimizer.{name} {optimizer.defaults[name]:g}" for name in ("lr", "weight_decay"))
        yield f"--model.optimizer bitsandbytes.optim.AdamW8bit {kept}", eight_bits
    if not is_frozen:
        tune = replace(language_model.tune, mode="lora")
        yield "--model.language_model.tune.mode lora", _with_options(run, "language_model", tune=tune)
    if is_frozen and language_model.quantize is None and not is_spread and language_model.pretrained:
        yield "--model.language_model.quantize nf4", _with_options(run, "language_model", quantize="nf4")


def _smaller_shares(run: Run, placement: Placement, zero: Zero) -> Iterator[Change]:
    """The next stage of ZeRO, and what it can put into the memory of the machine."""
    if zero.stage == 2:
        yield (
            "--trainer.strategy.stage 3",
            replace(run, placement=replace(placement, is_sharded=True, zero=replace(zero, stage=3))),
        )
    if not zero.offload_optimizer:
        offloaded = replace(zero, offload_optimizer=True)
        yield "--trainer.strategy.offload_optimizer true", replace(run, placement=replace(placement, zero=offloaded))
    if zero.stage == 3 and not zero.offload_parameters:
        offloaded = replace(zero, offload_parameters=True)
        yield "--trainer.strategy.offload_parameters true", replace(run, placement=replace(placement, zero=offloaded))


def _less_activations(run: Run, plan: Plan) -> Iterator[Change]:
    """Fewer bytes in a step: blocks that are computed again, of the part first whose activations are the most, then smaller
    batches, of which a step has more."""
    prefix = "activations of "
    names = [kind.removeprefix(prefix) for kind, _ in plan.memory.most_common() if kind.startswith(prefix)]
    for name in dict.fromkeys([*names, "language_model"]):
        yield from _computed_again(run, name)
    data = run.datamodule
    smaller = copy.copy(data)
    smaller.train_loader = None
    twice = run.trainer.clone()
    twice.accumulate_grad_batches = 2 * run.accumulated
    accumulate = f"--trainer.accumulate_grad_batches {twice.accumulate_grad_batches}"
    if data.batch_size > 1 and data.batching.kind != "padded":
        smaller.batch_size = data.batch_size // 2
        yield f"--data.batch_size {smaller.batch_size} {accumulate}", replace(run, datamodule=smaller, trainer=twice)
    elif data.batching.kind != "rows" and data.batching.max_tokens >= 1024:
        smaller.batching = replace(data.batching, max_tokens=data.batching.max_tokens // 2)
        flags = f"--data.batching.max_tokens {smaller.batching.max_tokens} {accumulate}"
        yield flags, replace(run, datamodule=smaller, trainer=twice)


def _computed_again(run: Run, name: str) -> Iterator[Change]:
    """Activation checkpointing of a part that keeps activations: the language model, or an encoder that trains.

    Args:
        run: The run.
        name: The part.
    """
    for owner, option, tune in _tunes(run, name):
        keeps = tune.mode != "frozen" or name == "language_model"  # gradients go through a frozen one to what lies before it
        if keeps and not tune.activation_checkpointing:
            changed = _with_options(run, owner, **{option: replace(tune, activation_checkpointing=True)})
            yield f"--model.{owner}.{option}.activation_checkpointing true", changed


def _tunes(run: Run, name: str) -> Iterator[tuple[str, str, Tune]]:
    """The options that may say what of a part is kept: whose they are, what they are called, and what they are."""
    part, language_model = run.model.parts().get(name), run.model.model.language_model
    if isinstance(part, Encoder | LanguageModel):
        yield name, "tune", part.tune
    elif part is None and isinstance(language_model, PretrainedMLLM):  # a stretch of a ready model, known when that is built
        yield "language_model", "vision_tune", language_model.vision_tune
        yield "language_model", "audio_tune", language_model.audio_tune


def _with_options(run: Run, name: str, **options: Any) -> Run:
    """The run with other options of a part."""
    model = copy.deepcopy(run.model)
    for option, value in options.items():
        setattr(model.parts()[name], option, value)
    return replace(run, model=model)
