"""What a checkpoint says of how it was trained, by objective and optimizer, so that no run goes on from it in another way."""

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from encoders.base import Part, option_defaults
from lightning_modules.optim import WarmupCosine, warmup_cosine
from models.checkpoint import check_options

JUDGED_ELSEWHERE = {"prompt", "optimizer", "lr_scheduler", "lr_factor"}
"""Options that are judged by what they make: the processor, and the groups of the optimizer with their rates."""

HOW_COMPUTED = ("foreach", "fused", "capturable", "differentiable")
"""Options of an optimizer that say how a step is computed, not which: those of the run at hand hold."""

NOT_COMPARED = {*HOW_COMPUTED, "name", "params", "initial_lr"}
"""What is in a group besides."""

RESTORED = {"_last_lr", "base_lrs"}
"""What a scheduler's state has of learning rates, which the groups have, too."""


def given_options(cls: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name, with defaults, those that it hands on to its parents included.

    Args:
        cls: The class, whose constructor may begin with `*args`, which are its parents'.
        args: Arguments without names.
        kwargs: Those with names.
    """
    named: dict[str, Any] = {}
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        signature = inspect.signature(vars(parent)["__init__"])
        bound = signature.bind_partial(None, *args).arguments
        rest = {parameter.name for parameter in signature.parameters.values() if parameter.kind is parameter.VAR_POSITIONAL}
        named |= {name: value for name, value in list(bound.items())[1:] if name not in rest}
        if not rest:
            break
        args = next((bound[name] for name in rest if name in bound), ())
    return option_defaults(cls) | named | dict(kwargs)


def describe(value: Any) -> Any:
    """An option as JSON; of an object its class and what its public attributes hold."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Path():
            return str(value)
        case list() | tuple():
            return [describe(item) for item in value]
        case set() | frozenset():
            return sorted(map(str, value))
        case Mapping():
            return {str(name): describe(item) for name, item in value.items()}
        case type() | FunctionType() | BuiltinFunctionType():
            return f"{value.__module__}.{value.__qualname__}"
        case partial():
            return {"partial": describe(value.func), "args": describe(value.args), **describe(value.keywords)}
    if dataclasses.is_dataclass(value):
        own = {field.name: describe(vars(value)[field.name]) for field in dataclasses.fields(value)}
    else:
        attributes = value.__dict__ if type(value).__dictoffset__ else {}  # 0: instances have none
        own = _plain({name: held for name, held in attributes.items() if not name.startswith("_")})
    return {"class_path": describe(type(value)), **own}


def describe_options(options: Mapping[str, Any], free: Collection[str] = ()) -> dict[str, Any]:
    """The options of a module that a resumed run must have too, as JSON, without parts, which describe themselves.

    Args:
        options: All of them.
        free: Those of which a resumed run may have others.
    """
    own = {name: value for name, value in options.items() if name not in free and name not in JUDGED_ELSEWHERE}
    return {name: describe(value) for name, value in own.items() if not isinstance(value, Part)}


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer as JSON, before its first step: its class, and the options of its groups by their names."""
    groups = {}
    for number, group in enumerate(optimizer.param_groups):
        lr = float(group.get("initial_lr", group["lr"]))  # a schedule begins below it
        options = {name: value for name, value in _plain(group).items() if name not in NOT_COMPARED}
        groups[group.get("name", f"group {number}")] = options | {"lr": lr}
    return {"class_path": describe(type(optimizer)), "groups": groups}


def describe_schedule(scheduler: LRScheduler) -> dict[str, Any]:
    """A schedule as JSON, before its first step: its class and options, and of `WarmupCosine` the curve, which follows from how
    long a run is."""
    state = {name: value for name, value in scheduler.state_dict().items() if name not in RESTORED}
    found = {"class_path": describe(type(scheduler)), "options": _plain(state)}
    return found | ({"curve": scheduler.curve()} if isinstance(scheduler, WarmupCosine) else {})


def check_objective(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuses to go on with another objective.

    Args:
        now: The run's: `class_path`, `init_args`, and the `parts` that are not the model's.
        saved: The checkpoint's. An option that only one of the two has is not compared.

    Raises:
        ValueError: The class or an option is another.
    """
    if now["class_path"] != saved["class_path"]:
        was, here = (spec["class_path"].rpartition(".")[2] for spec in (saved, now))
        raise ValueError(
            f"the checkpoint is of a run with {was} ({saved['class_path']}), but here the model is {here}: --ckpt_path goes on "
            "with the run that wrote it, and nothing else. To start another run from its weights, give --model.init_from "
            "instead of --ckpt_path"
        )
    if changed := _differences(saved["init_args"], now["init_args"], "model."):
        raise ValueError(
            f"the checkpoint was trained with {'; '.join(changed)}. A run goes on with the objective that it began with: set "
            "that back, or start another run from its weights with --model.init_from instead of --ckpt_path"
        )
    check_options(now["parts"], saved["parts"])


def check_optimizer(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuses to go on with another optimizer or schedule, whose options the checkpoint's would replace without a word.

    Args:
        now: The run's `optimizers` and `schedules`.
        saved: The checkpoint's.

    Raises:
        ValueError: A class, a group or an option is another.
    """
    changed: list[str] = []
    for kind in ("optimizers", "schedules"):
        classes = [", ".join(spec["class_path"] for spec in specs[kind]) or "none" for specs in (saved, now)]
        if classes[0] != classes[1]:
            changed.append(f"{classes[0]} as {kind.removesuffix('s')}, but here it is {classes[1]}")
    if not changed:
        for own, other in zip(now["optimizers"], saved["optimizers"], strict=True):
            if own["groups"].keys() != other["groups"].keys():
                changed.append(f"the groups {', '.join(other['groups'])}, but here they are {', '.join(own['groups'])}")
            groups: dict[str, list[str]] = {}
            for name in own["groups"].keys() & other["groups"].keys():
                for difference in _differences(other["groups"][name], own["groups"][name], ""):
                    groups.setdefault(difference, []).append(name)
            changed += [f"{difference} (of {', '.join(sorted(names))})" for difference, names in groups.items()]
        for own, other in zip(now["schedules"], saved["schedules"], strict=True):
            changed += _differences(other["options"], own["options"], f"{own['class_path'].rpartition('.')[2]}.")
    if changed:
        raise ValueError(
            f"the checkpoint was trained with {'; '.join(sorted(changed))}. A run goes on with the optimizer that it began with "
            "(a learning rate is a part's tune.lr or model.optimizer.lr, times model.lr_factor): set that back, or start another "
            "run from its weights with --model.init_from instead of --ckpt_path"
        )


def new_curve(now: Mapping[str, Any], saved: Mapping[str, Any], step: int) -> str:
    """What to say where a run is made longer or shorter than it was, and its learning rates so follow another curve; else empty.

    Args:
        now: The run's `schedules`.
        saved: The checkpoint's.
        step: Where the checkpoint was written.
    """
    for own, other in zip(now["schedules"], saved["schedules"], strict=True):
        after, before = own.get("curve"), other.get("curve")
        if after and before and after != before:
            was, here = (warmup_cosine(step, **curve) for curve in (before, after))
            return (
                f"the run is now one of {after['total_steps']:,} steps, and was one of {before['total_steps']:,}: its learning "
                f"rate goes on as if it had been so long from its beginning, in the next step with {here:.3g} of the full rate "
                f"instead of {was:.3g}"
            )
    return ""


def keep_how_computed(saved: Iterable[dict[str, Any]], own: Iterable[Mapping[str, Any]]) -> None:
    """Gives groups of an optimizer in a checkpoint the options of the run at hand that say how a step is computed."""
    for group, now in zip(saved, own, strict=False):
        group.update({name: now[name] for name in HOW_COMPUTED if name in now and name in group})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of some values."""
    return {name: describe(value) for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    match value:
        case None | bool() | int() | float() | str():
            return True
        case list() | tuple():
            return all(map(_is_plain, value))
        case Mapping():
            return all(map(_is_plain, value.values()))
    return False


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[str]:
    """The options that both have, and not alike, in words."""
    names = [name for name in now if name in saved and saved[name] != now[name]]
    return [_difference(f"{prefix}{name}", saved[name], now[name]) for name in names]


def _difference(name: str, saved: Any, now: Any) -> str:
    text = f"{name} = {saved}, but here it is {now}"
    return text if len(text) <= 200 else f"another {name}"
