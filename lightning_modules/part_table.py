"""What trains: shown when a fit starts, and refused where it is not what the options say."""

import inspect
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from encoders.base import Part
from lightning_modules.checkpoints import write_account
from lightning_modules.optim import NO_DECAY
from lightning_modules.zero import ZeroStrategy
from models.stored import num_weights, stored_type

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_modules.multimodal import MultiModalLitModule


class PartTable(Callback):
    """Shows what trains when a fit starts, and keeps it as `parts.json` in the run folder."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the table, as it is asked for, and warns of a learning rate that was asked for in vain.

        Raises:
            ValueError: A part has no weights to train though it should, or nothing trains.
        """
        parts = cast("MultiModalLitModule", pl_module).parts()
        rows = _rows(trainer, parts)
        if problem := _problem_of_parts(rows):
            raise ValueError(problem)
        if trainer.is_global_zero:
            from rich import get_console

            get_console().print(_table(rows))
        strategy = trainer.strategy
        for optimizer in [strategy.optimizer] if isinstance(strategy, ZeroStrategy) else trainer.optimizers:
            if warning := unused_lr(parts, optimizer.defaults.get("lr")):
                rank_zero_warn(warning)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table; a resumed run has the optimizer of its checkpoint by now."""
        if trainer.is_global_zero:
            rows = _rows(trainer, cast("MultiModalLitModule", pl_module).parts())
            write_account(trainer, "parts.json", json.dumps(rows, indent=2) + "\n")


def unused_lr(parts: dict[str, Part], lr: float | None) -> str:
    """What to say of an optimizer's own learning rate that was set though no part takes it; empty where all is well.

    Args:
        parts: The parts of the model by name.
        lr: The learning rate; None: the optimizer has none.
    """
    training = {name: part for name, part in parts.items() if any(p.requires_grad for _, p in part.own_named_parameters())}
    if lr in (None, _default_lr()) or any(part.tune.lr is None for part in training.values()):
        return ""
    rates = ", ".join(f"{name} {part.tune.lr:g}" for name, part in training.items())
    return (
        f"model.optimizer has lr {lr:g}, but no part takes it: each has a tune.lr of its own ({rates}). Change those, or set "
        "them to null"
    )


def _rows(trainer: Trainer, parts: dict[str, Part]) -> list[dict[str, Any]]:
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [_describe(name, part, groups) for name, part in parts.items()]


def _default_lr() -> float:
    """The optimizer's own learning rate where nobody sets one."""
    from lightning_modules.multimodal import MultiModalLitModule

    default = inspect.signature(MultiModalLitModule.__init__).parameters["optimizer"].default
    return default([nn.Parameter(torch.zeros(1))]).defaults["lr"]


def _describe(name: str, part: Part, groups: list[dict[str, Any]]) -> dict[str, Any]:
    parameters = [parameter for _, parameter in part.own_named_parameters()]
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    own = {id(parameter) for parameter in trainable}
    of_part = [  # by name, too: the groups of an engine hold shares
        group
        for group in groups
        if group.get("name", "").removesuffix(NO_DECAY) == name or any(id(parameter) in own for parameter in group["params"])
    ]
    # a scheduler starts its warm-up below the learning rate that was asked for, and keeps that one as `initial_lr`
    rates = [group.get("initial_lr", group["lr"]) for group in of_part]
    dtypes: Counter[str] = Counter()
    for parameter in parameters:
        dtypes[stored_type(parameter)] += num_weights(parameter)
    return {
        "part": name,
        "class": part.class_name,
        "mode": part.tune.mode,
        "parameters": sum(num_weights(parameter) for parameter in parameters),
        "trainable": sum(num_weights(parameter) for parameter in trainable),
        "lr": max(rates) if rates else part.tune.lr if trainable else None,
        "dtype": " + ".join(dtype for dtype, _ in dtypes.most_common()),
    }


def _problem_of_parts(rows: list[dict[str, Any]]) -> str:
    for row in rows:
        is_shell = not row["parameters"] and any(other["part"].startswith(f"{row['part']}.") for other in rows)
        if row["mode"] != "frozen" and not row["trainable"] and not is_shell:
            return (
                f"{row['part']} ({row['class']}) has tune.mode {row['mode']}, but none of its {row['parameters']:,} parameters "
                "trains: let its build() end with apply_tune, or set tune.mode to frozen"
            )
        if row["mode"] == "frozen" and row["trainable"]:
            return (
                f"{row['part']} ({row['class']}) has tune.mode frozen, but {row['trainable']:,} of its parameters would train: "
                "let its build() end with apply_tune, or set tune.mode to full"
            )
    if not any(row["trainable"] for row in rows):
        names = ", ".join(row["part"] for row in rows)
        return f"nothing trains: every part is frozen ({names}). Set the tune.mode of at least one part to lora or full"
    return ""


def _table(rows: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_footer=True)
    total = {key: f"{sum(row[key] for row in rows):,}" for key in ("parameters", "trainable")}
    for key in ("part", "class", "mode", "parameters", "trainable", "lr", "dtype"):
        right = key in ("parameters", "trainable", "lr")
        footer = total.get(key, "total" if key == "part" else "")
        table.add_column(key, footer=footer, justify="right" if right else "left", overflow="fold")
    for row in rows:
        rate = "-" if row["lr"] is None else f"{row['lr']:.2g}"
        counts = [f"{row['parameters']:,}", f"{row['trainable']:,}"]
        style = None if row["trainable"] else "dim"
        table.add_row(row["part"], row["class"], row["mode"], *counts, rate, row["dtype"], style=style)
    return table
