"""A plan as text for the terminal, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from datamodules.batch import RowError
from planning.advice import Advice, Refused
from planning.devices import GIB
from planning.epoch import PlannedBatch
from planning.run import Plan, Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_IDS = 8
"""Rows of a batch that are named."""


def show_plan(
    run: Run, plan: Plan, advice: Sequence[Advice], refused: Sequence[Refused] = (), console: "Console | None" = None
) -> None:
    """Shows a plan.

    Args:
        run: What was planned.
        plan: The plan.
        advice: What would let it fit.
        refused: What was looked at for that, and is refused.
        console: Where to; None: standard output.
    """
    from rich import get_console
    from rich.text import Text

    console = get_console() if console is None else console
    console.print(_parts(plan))
    console.print(_memory(plan))
    console.print(Text(verdict(run, plan), "bold"), soft_wrap=True)
    for change in advice:
        console.print(Text(f"  {change.flags}  -> {readable(change.total)}{' fits' if change.fits else ''}"), soft_wrap=True)
    for no in refused:
        console.print(Text(f"  {no.flags}  is refused: {no.why}", "dim"), soft_wrap=True)
    console.print(Text(f"\n{epoch_facts(run, plan)}\n{compute_facts(run, plan)}"), soft_wrap=True)
    console.print(_batches(run, plan))


def as_json(run: Run, plan: Plan, advice: Sequence[Advice], refused: Sequence[Refused] = ()) -> str:
    """A plan as JSON, all sizes in bytes."""
    epoch = {name: value for name, value in vars(plan.epoch).items() if name not in ("largest", "most_encoded")}
    report: dict[str, Any] = {
        "device": asdict(run.device),
        "placement": asdict(run.placement),
        "parts": [asdict(part) for part in plan.parts],
        "memory": dict(plan.memory.most_common()),
        "total": plan.total,
        "on_host": dict(plan.on_host.most_common()),
        "fits": plan.fits(run.device),
        "advice": [asdict(change) for change in advice],
        "refused": [asdict(change) for change in refused],
        "epoch": epoch,
        "flops": plan.flops,
        "epoch_flops": plan.epoch_flops,
        "largest": [
            {"places": batch.places, "tokens": batch.tokens, "encoded": batch.encoded, "ids": _ids(run, batch)}
            for batch in plan.epoch.largest
        ],
    }
    return json.dumps(report, indent=2, ensure_ascii=False) + "\n"


def verdict(run: Run, plan: Plan) -> str:
    """Whether the run fits, in a sentence."""
    total, device = readable(plan.total), run.device
    where = f"a device ({run.placement})" if run.placement.replicas * run.placement.split > 1 else "the device"
    if plan.fits(device):
        tight = "; that is tight: the allocator needs room between its blocks" if plan.total > 0.92 * device.gib * GIB else ""
        return f"{total} at the peak of {where}: {device.name} with {device.gib:.1f} GiB has room for it{tight}"
    dominant, size = plan.memory.most_common(1)[0]
    return (
        f"{total} at the peak of {where}: too much for {device.name} with {device.gib:.1f} GiB; {readable(size)} are {dominant}"
    )


def epoch_facts(run: Run, plan: Plan) -> str:
    """What an epoch is made of, in a sentence."""
    epoch, batching = plan.epoch, run.datamodule.batching
    unusable = f" ({epoch.unusable:,} cannot be used)" if epoch.unusable else ""
    padding = 100 * (1 - epoch.tokens / epoch.places)
    processes = f" on each of {run.placement.replicas} processes" if run.placement.replicas > 1 else ""
    steps = f"{epoch.steps:,} steps" + (f" of {run.accumulated}" if run.accumulated > 1 else "")
    total = "" if epoch.total_steps is None else f"; the run: {epoch.total_steps:,} steps"
    return (
        f"an epoch: {epoch.rows:,} rows{unusable}, {epoch.tokens:,} tokens, the longest row {epoch.longest:,}; batches "
        f"({batching.kind}) are {padding:.1f} % padding; {epoch.batches:,} batches{processes}, {steps}{total}"
    )


def compute_facts(run: Run, plan: Plan) -> str:
    """What a step and an epoch compute, in a sentence."""
    step, device = plan.epoch_flops / max(1, plan.epoch.steps), run.device
    text = (
        f"operations: {plan.flops:.3g} of a device in the largest batch, {step:.3g} in a step, {plan.epoch_flops:.3g} in an epoch"
    )
    if device.teraflops is None:
        return text
    seconds = plan.epoch_flops / (run.placement.replicas * run.placement.split) / (device.teraflops * 1e12)
    at_most = f"at the {device.teraflops:g} TFLOP/s of {device.name} that is {seconds / 3600:.2g} hours"
    return f"{text}; {at_most}, which is never reached: reckon with 2 to 3 times as long"


def _parts(plan: Plan) -> "Table":
    table = _table("part", "parameters", "trainable", "on a device")
    for part in plan.parts:
        table.add_row(part.name, f"{part.parameters:,}", f"{part.trainable:,}", readable(part.weight_bytes))
    if len(plan.parts) > 1:
        numbers = zip(*((part.parameters, part.trainable, part.weight_bytes) for part in plan.parts), strict=True)
        parameters, trainable, size = map(sum, numbers)
        table.add_row("all", f"{parameters:,}", f"{trainable:,}", readable(size), style="bold")
    return table


def _memory(plan: Plan) -> "Table":
    table = _table("memory of a device", "", "share")
    small = 0
    for kind, size in plan.memory.most_common():
        if size < 0.01 * plan.total:
            small += size
            continue
        table.add_row(kind, readable(size), f"{100 * size / plan.total:.0f} %")
    if small:
        table.add_row("the rest", readable(small), f"{100 * small / plan.total:.0f} %")
    table.add_row("at the peak", readable(plan.total), "", style="bold")
    if plan.on_host:
        table.add_row("in the machine's memory, for each device", readable(plan.on_host.total()), "")
    return table


def _batches(run: Run, plan: Plan) -> "Table":
    table = _table("largest batches", "tokens", "with padding", "encoder tokens")
    for batch in dict.fromkeys((*plan.epoch.largest, plan.epoch.most_encoded)):
        ids = _ids(run, batch)
        more = f" and {len(ids) - MOST_IDS} more" if len(ids) > MOST_IDS else ""
        table.add_row(f"{', '.join(ids[:MOST_IDS])}{more}", f"{batch.tokens:,}", f"{batch.places:,}", f"{batch.encoded:,}")
    return table


def _ids(run: Run, batch: PlannedBatch) -> list[str]:
    """The ids of its rows, the longest first."""
    dataset = run.datamodule.train_dataset
    sizes = run.datamodule.train_dataloader().sizes()
    ids = []
    for row in sorted((key.row for key in batch.keys), key=lambda row: -int(sizes.tokens_R[row])):
        try:
            ids.append(dataset.sample(row).id)
        except RowError as error:
            ids.append(str(error.origin))
    return ids


def readable(size: float) -> str:
    """A number of bytes, for people."""
    return f"{size / GIB:,.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.2f} MiB"


def _table(*columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table
