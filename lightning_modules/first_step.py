"""What is checked before a fit goes on: what trains, and that the first batch teaches it something.

Shape suffixes: B rows, T tokens, E ends of answers.
"""

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, MODALITIES, Batch
from encoders.base import Part
from lightning_modules.run_folder import run_folder, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_modules.multimodal import MultiModalLitModule


class PartTable(Callback):
    """Shows what trains when a fit starts, and keeps it as `parts.json` in the run folder."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the table.

        Raises:
            ValueError: A part has no weights to train though it should, or nothing trains.
        """
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rows = [_describe(name, part, groups) for name, part in cast("MultiModalLitModule", pl_module).parts().items()]
        if problem := _problem_of_parts(rows):
            raise ValueError(problem)
        if trainer.is_global_zero:
            from rich import get_console

            get_console().print(_table(rows))
            write_text(run_folder(trainer) / "parts.json", json.dumps(rows, indent=2) + "\n")


def _describe(name: str, part: Part, groups: list[dict[str, Any]]) -> dict[str, Any]:
    parameters = list(part.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    own = {id(parameter) for parameter in trainable}
    # a scheduler starts its warm-up below the learning rate that was asked for, and keeps that one as `initial_lr`
    rates = [
        group.get("initial_lr", group["lr"]) for group in groups if any(id(parameter) in own for parameter in group["params"])
    ]
    dtypes: Counter[str] = Counter()
    for parameter in parameters:
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {
        "part": name,
        "class": type(part).__name__,
        "mode": part.tune.mode,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in trainable),
        "lr": max(rates) if rates else part.tune.lr if trainable else None,
        "dtype": " + ".join(dtype for dtype, _ in dtypes.most_common()),
    }


def _problem_of_parts(rows: list[dict[str, Any]]) -> str:
    for row in rows:
        if row["mode"] != "frozen" and not row["trainable"]:
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
        table.add_column(key, footer=total.get(key, "total" if key == "part" else ""), justify="right" if right else "left")
    for row in rows:
        rate = "-" if row["lr"] is None else f"{row['lr']:.2g}"
        counts = [f"{row['parameters']:,}", f"{row['trainable']:,}"]
        style = None if row["trainable"] else "dim"
        table.add_row(row["part"], row["class"], row["mode"], *counts, rate, row["dtype"], style=style)
    return table


class FirstStepCheck(Callback):
    """Checks the labels and the gradients of the first batch of a fit, also of a resumed one; it costs about nothing.

    Tokens must be supervised, answers must end in the end token, every trainable part that the batch used must get a
    gradient, and nothing frozen may get one.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._done = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks again in every fit."""
        self._done = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Checks the labels, before the model sees them.

        Raises:
            ValueError: Nothing is supervised, or an answer without its end token.
        """
        if self._done:
            return
        self._batch = batch
        problem = ""
        if batch["examples"]:  # a batch all of whose rows were skipped has nothing to check
            problem = problem_of_labels(batch, set(cast("MultiModalLitModule", pl_module).processor.eos_ids))
        _raise_together(trainer, problem)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the gradients of the first backward pass.

        Raises:
            ValueError: A trainable part without a gradient, or a frozen one with one.
        """
        if self._done or self._batch is None:
            return
        batch, self._batch, self._done = self._batch, None, True
        parts = cast("MultiModalLitModule", pl_module).parts()
        # the scaled gradients of float16 overflow in the first steps; its scaler then lowers the scale
        may_overflow = trainer.precision == "16-mixed"
        _raise_together(trainer, problem_of_gradients(parts, batch, may_overflow) if batch["examples"] else "")
        supervised = int((batch["labels_BT"] != IGNORE_INDEX).sum())
        training = ", ".join(name for name, part in parts.items() if part.tune.mode != "frozen" and name not in _idle(batch))
        rank_zero_info(
            f"first step: {supervised:,} supervised tokens in {len(batch['examples'])} rows, answers end in their end token, "
            f"gradients reach {training} and nothing that is frozen"
        )


def problem_of_labels(batch: Batch, eos_ids: set[int]) -> str:
    """What is wrong with the labels of a batch, in words; empty where all is well.

    Args:
        batch: A training batch with at least one row.
        eos_ids: Tokens that end an answer.
    """
    labels_BT, segments_BT = batch["labels_BT"], batch["segments_BT"]
    supervised_BT = labels_BT != IGNORE_INDEX
    if not supervised_BT.any():
        return (
            f"none of the {int((segments_BT > 0).sum()):,} tokens of the first batch is supervised, so nothing would be learnt: "
            f"look at the answers of {_row(batch, 0, 1)} and the rows after it; max_length may have cut them off, or the chat "
            "template may not mark them"
        )
    same_next_BT = torch.zeros_like(supervised_BT)
    same_next_BT[:, :-1] = segments_BT[:, :-1] == segments_BT[:, 1:]
    next_BT = supervised_BT.roll(-1, dims=1) & same_next_BT
    ends_BT = supervised_BT & ~next_BT
    if batch["num_dropped_tokens"]:  # an answer that max_length cut, at the end of its sample, has lost its end token
        ends_BT &= same_next_BT
    eos_E = torch.tensor(sorted(eos_ids), device=labels_BT.device)
    wrong = (ends_BT & ~torch.isin(labels_BT, eos_E)).nonzero().tolist()
    if wrong:
        row, position = wrong[0]
        return (
            f"{_row(batch, row, int(segments_BT[row, position]))}: the last supervised token of an answer has id "
            f"{int(labels_BT[row, position])}, which is no end token ({', '.join(map(str, sorted(eos_ids)))}). The model would "
            f"never learn to stop. Check that the chat template closes the answer with the tokenizer's end token; "
            f"{len(wrong)} answers of this batch are so"
        )
    return ""


def problem_of_gradients(parts: dict[str, Part], batch: Batch, may_overflow: bool = False) -> str:
    """What is wrong with the gradients after a backward pass, in words; empty where all is well.

    Args:
        parts: The parts of the model by name.
        batch: The batch of the backward pass. A part whose modality it lacks needs no gradient.
        may_overflow: Non-finite gradients are no fault.
    """
    for name, part in parts.items():
        for path, parameter in part.named_parameters():
            if parameter.grad is not None and (part.tune.mode == "frozen" or not parameter.requires_grad):
                return f"{name}.{path} is frozen, but got a gradient: something has freed it after the part was built"
        if part.tune.mode == "frozen" or name in _idle(batch):
            continue
        sizes = {path: _size(parameter.grad) for path, parameter in part.named_parameters() if parameter.grad is not None}
        broken = [path for path, size in sizes.items() if not math.isfinite(size)]
        if broken and not may_overflow:
            return (
                f"the gradient of {name}.{broken[0]} is not finite ({len(broken)} of the {len(sizes)} gradients of {name}): look "
                "for non-finite weights or media, or train in bf16-mixed or 32-true instead of a narrower precision"
            )
        if not any(sizes.values()):
            got = "only gradients that are exactly 0" if sizes else "no gradient at all"
            return (
                f"{name} (tune.mode {part.tune.mode}) got {got} from the first batch, so it would not train. Its output may be "
                "detached, computed under no_grad, or not used in the loss; a last layer that starts at 0 also stops the "
                "gradient of what lies before it. To leave it as it is, set its tune.mode to frozen"
            )
    return ""


def _idle(batch: Batch) -> set[str]:
    """Names of the parts that a batch without their modality does not use."""
    return {f"{modality}_{kind}" for modality in MODALITIES if modality not in batch for kind in ("encoder", "projector")}


def _size(gradient: Tensor) -> float:
    """Largest absolute value; NaN and infinities come through."""
    return float(torch.linalg.vector_norm(gradient, ord=math.inf)) if gradient.numel() else 0.0


def _row(batch: Batch, row: int, segment: int) -> str:
    """File, line and id of a sample: the examples stand in the order of rows and, in a row, of its packed segments."""
    before = int(batch["segments_BT"][:row].amax(dim=1).sum()) if row else 0
    example = batch["examples"][before + segment - 1]
    return f"{example['file']}:{example['line']} (id {example['id']})"


def _raise_together(trainer: Trainer, problem: str) -> None:
    # a rank that raised alone would leave the others waiting for it
    if trainer.strategy.reduce_boolean_decision(bool(problem), all=False):
        raise ValueError(problem or "another process failed the check of its first step; its own message says why")
