"""What to change in a configuration whose run does not fit on its device."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from encoders.tuning import Tune
from planning.run import Plan, Run, plan_run

Change = tuple[str, Run]
"""Flags of the command line, and the run with them."""


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


def advise(run: Run, plan: Plan) -> list[Advice]:
    """Changes that together let a run fit, those first that touch what takes most; all that are known where they do not suffice.

    Args:
        run: A run.
        plan: Its plan.
    """
    advice: list[Advice] = []
    of_weights = sum(size for kind, size in plan.memory.items() if kind.startswith(("weights", "optimizer", "gradients", "DDP")))
    kinds: list[Callable[[Run], Iterator[Change]]] = [_less_activations, _smaller_weights]
    for kind in kinds[::-1] if of_weights > plan.total / 2 else kinds:
        while not plan.fits(run.device) and (change := next(kind(run), None)) is not None:
            flags, run = change
            plan = plan_run(run)
            advice.append(Advice(flags, plan.total, plan.fits(run.device)))
    return advice


def _smaller_weights(run: Run) -> Iterator[Change]:
    """Fewer bytes at rest: first what changes no number, then what changes few, then what changes the method."""
    language_model, placement = run.model.model.language_model, run.placement
    is_spread = placement.is_sharded or placement.split > 1
    is_frozen = language_model.tune.mode != "full"
    if placement.replicas > 1 and not is_spread and language_model.quantize is None:
        sharded = replace(placement, is_sharded=True, has_buckets=False)
        yield "--config configs/strategy/fsdp.yaml", replace(run, placement=sharded)
    if is_frozen and language_model.dtype == "float32" and language_model.quantize is None:
        yield "--model.language_model.dtype bfloat16", _with_options(run, dtype="bfloat16")
    if not is_frozen:
        tune = replace(language_model.tune, mode="lora")
        yield "--model.language_model.tune.mode lora", _with_options(run, tune=tune)
    if is_frozen and language_model.quantize is None and not is_spread and language_model.pretrained:
        yield "--model.language_model.quantize nf4", _with_options(run, quantize="nf4")


def _less_activations(run: Run) -> Iterator[Change]:
    """Fewer bytes in a step: blocks that are computed again, then smaller batches, of which a step has more."""
    tune, data = run.model.model.language_model.tune, run.datamodule
    if not tune.activation_checkpointing:
        flags = "--model.language_model.tune.activation_checkpointing true"
        yield flags, _with_options(run, tune=replace(tune, activation_checkpointing=True))
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


def _with_options(run: Run, **options: Tune | str) -> Run:
    """The run with other options of its language model."""
    model = copy.deepcopy(run.model)
    vars(model.model.language_model).update(options)
    return replace(run, model=model)
