"""What is checked before a fit goes on: that its first batch teaches the model something.

Shape suffixes: B rows, T tokens, E ends of answers.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from datamodules.batch import IGNORE_INDEX, MODALITIES, Batch
from encoders.base import Part
from lightning_modules.idle_parts import is_idle
from lightning_modules.loss_scale import scaler_of

if TYPE_CHECKING:
    from lightning_modules.multimodal import MultiModalLitModule


class FirstStepCheck(Callback):
    """Checks the labels and the gradients of the first batch of a fit, also of a resumed one; it costs about nothing.

    Tokens must be supervised, answers must end in the end token, every trainable parameter of a part that the batch used
    must get a gradient, one that is not 0 wherever something can be learnt, and nothing frozen may get one. What lies before
    gates that start at 0 gets exactly 0 at first: it is looked at again as soon as they have opened.
    """

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._done = False
        self._waits_for_gates = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks again in every fit."""
        self._done = self._waits_for_gates = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Checks the labels, before the model sees them.

        Raises:
            ValueError: Nothing is supervised, or an answer without its end token.
        """
        if self._done:
            return
        self._batch = batch
        if self._waits_for_gates:
            return
        problem = ""
        if batch["examples"]:  # a batch all of whose rows were skipped has nothing to check
            problem = problem_of_labels(batch, set(cast("MultiModalLitModule", pl_module).processor.eos_ids))
        _raise_together(trainer, problem)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the gradients of the first backward pass, and where there are gates those of the first that they let through.

        Raises:
            ValueError: Something trainable without a gradient, or something frozen with one.
        """
        if self._done or self._batch is None:
            return
        batch, self._batch = self._batch, None
        if cast("MultiModalLitModule", pl_module).is_spread:  # each process has but its share of the gradients
            self._done = True
            return
        module = cast("MultiModalLitModule", pl_module)
        parts = module.parts()
        # the scaled gradients of float16 overflow in the first steps; its scaler then lowers the scale
        may_overflow = scaler_of(trainer) is not None or module.on_non_finite == "skip"
        _raise_together(trainer, problem_of_gradients(parts, batch, may_overflow) if batch["examples"] else "")
        is_first, shut = not self._waits_for_gates, [name for name, part in parts.items() if part.is_shut]
        has_looked = bool(batch["examples"]) and (is_first or _has_media(batch))
        if not trainer.strategy.reduce_boolean_decision(has_looked, all=False):
            return
        self._waits_for_gates, self._done = bool(shut), not shut
        if has_looked and (is_first or self._done):
            rank_zero_info(_report(parts, batch, shut) if is_first else f"step {trainer.global_step:,}: {_reached(parts, batch)}")


def _report(parts: Mapping[str, Part], batch: Batch, shut: Sequence[str]) -> str:
    supervised = int((batch["labels_BT"] != IGNORE_INDEX).sum())
    later = f"; what lies before the gates of {', '.join(shut)} is looked at when they have opened" if shut else ""
    return (
        f"first step: {supervised:,} supervised tokens in {len(batch['examples'])} rows, answers end in their end token, "
        f"{_reached(parts, batch)}{later}"
    )


def _reached(parts: Mapping[str, Part], batch: Batch) -> str:
    training = [name for name, part in parts.items() if part.tune.mode != "frozen" and not is_idle(name, part, batch)]
    reached = [name for name in training if not _may_get_zeros(name, parts)]
    return f"gradients reach all that trains of {', '.join(reached)} and nothing that is frozen"


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
    if "branches_BT" in batch:
        same_next_BT[:, :-1] &= batch["branches_BT"][:, :-1] == batch["branches_BT"][:, 1:]
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


def problem_of_gradients(parts: Mapping[str, Part], batch: Batch, may_overflow: bool = False) -> str:
    """What is wrong with the gradients after a backward pass, in words; empty where all is well.

    Args:
        parts: The parts of the model by name.
        batch: The batch of the backward pass. A part whose modality it lacks needs no gradient.
        may_overflow: Non-finite gradients are no fault.
    """
    training: dict[str, dict[str, nn.Parameter]] = {}
    for name, part in parts.items():
        if part.is_shut and not any(gate.requires_grad for gate in part.gates.values()):
            return (
                f"the gates of {name} (tune.mode {part.tune.mode}) are 0 and do not train, so nothing that lies before it would "
                "ever count: set its tune.mode to full, or start from a run that has trained it, with model.init_from"
            )
        for path, parameter in part.own_named_parameters():
            if parameter.requires_grad and part.tune.mode != "frozen":
                training.setdefault(name, {})[path] = parameter
            elif parameter.grad is not None:
                return f"{name}.{path} is frozen, but got a gradient: something has freed it after the part was built"
    gradients = {
        (name, path): parameter.grad
        for name, parameters in training.items()
        for path, parameter in parameters.items()
        if parameter.grad is not None
    }
    sizes = dict(zip(gradients, _sizes(list(gradients.values())), strict=True))
    for name, parameters in training.items():
        if is_idle(name, parts[name], batch):
            continue
        own = {path: sizes[name, path] for path in parameters if (name, path) in sizes}
        if problem := _not_finite(own) if not may_overflow else "":
            return f"{name} (tune.mode {parts[name].tune.mode}): {problem}"
        if parts[name].is_shut and not any(own.get(path) for path in parts[name].gates):
            return (
                f"the gates of {name} are 0 and got only gradients that are exactly 0 from the first batch, so they would never "
                "open: what lies before it may give the same for whatever it is given"
            )
        if problem := _teaches_nothing(parameters, own, _may_get_zeros(name, parts)):
            return f"{name} (tune.mode {parts[name].tune.mode}): {problem}"
    return ""


def _not_finite(sizes: Mapping[str, float]) -> str:
    broken = [path for path, size in sizes.items() if not math.isfinite(size)]
    if not broken:
        return ""
    return (
        f"{len(broken)} of its {len(sizes)} gradients are not finite ({_some(broken)}): look for non-finite weights or media, or "
        "train in bf16-mixed or 32-true instead of a narrower precision"
    )


def _teaches_nothing(parameters: Collection[str], sizes: Mapping[str, float], zeros_are_fine: bool) -> str:
    """What of a part would not train.

    Args:
        parameters: Its trainable parameters.
        sizes: The largest absolute value of each gradient that there is.
        zeros_are_fine: Gradients that are exactly 0 say nothing.
    """
    if missing := [path for path in parameters if path not in sizes]:
        return (
            f"{len(missing)} of its {len(parameters)} trainable parameters got no gradient from the first batch "
            f"({_some(missing)}), so they would not train. They may be used under no_grad or behind a detach, or not at all; "
            "layers must not be left out at random, since several processes wait for each gradient. To leave them as they are, "
            "freeze them in build(), or set tune.mode to frozen"
        )
    learns: dict[str, bool] = {}  # an adapter learns as one: its A gets exactly 0 while its B is 0
    for path, size in sizes.items():
        adapter = path.partition(".lora_")[0] if ".lora_" in path else ""
        learns[adapter] = learns.get(adapter, False) or size != 0
    silent = [adapter for adapter, learnt in learns.items() if not learnt]
    if not silent or zeros_are_fine:
        return ""
    what = "it" if silent == [""] else f"{len(silent)} of its {len(learns)} adapters ({_some(silent)})"
    return (
        f"{what} got only gradients that are exactly 0 from the first batch, so nothing would be learnt there. A factor or a "
        "last layer that starts at 0 stops the gradient of what lies before it, and so does an activation that is 0 everywhere. "
        "To leave the part as it is, set its tune.mode to frozen"
    )


def _may_get_zeros(name: str, parts: Mapping[str, Part]) -> bool:
    """Whether a part lies before gates that let nothing through yet; only the language model does not."""
    return name != "language_model" and not parts[name].is_shut and any(part.is_shut for part in parts.values())


def _has_media(batch: Batch) -> bool:
    return any(modality in batch for modality in MODALITIES)


def _sizes(gradients: Sequence[Tensor]) -> list[float]:
    """The largest absolute value of each; NaN and infinities come through. The device is waited for once."""
    if not gradients:
        return []
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(x, ord=math.inf) if x.numel() else x.new_zeros(()) for x in gradients]
    return torch.stack([norm.to(device, torch.float32) for norm in norms]).tolist()


def _some(names: Sequence[str], at_most: int = 3) -> str:
    return ", ".join(names[:at_most]) + (", …" if len(names) > at_most else "")


def _row(batch: Batch, row: int, segment: int) -> str:
    """File, line and id of a sample: the examples stand in the order of rows and, in a row, of its packed segments."""
    before = int(batch["segments_BT"][:row].amax(dim=1).sum()) if row else 0
    example = batch["examples"][before + segment - 1]
    return f"{example['file']}:{example['line']} (id {example['id']})"


def _raise_together(trainer: Trainer, problem: str) -> None:
    # a rank that raised alone would leave the others waiting for it
    if trainer.strategy.reduce_boolean_decision(bool(problem), all=False):
        raise ValueError(problem or "another process failed the check of its first step; its own message says why")
