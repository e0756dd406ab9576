"""What the optimizer gets: groups of parameters by part, clipped gradients, and the schedule of their learning rates."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from encoders.base import Part
from models.checkpoint import in_memory
from models.flat_layer import shape_of

NO_DECAY = "/no_decay"
"""Ends the names of groups whose weights do not decay."""


def take_into_memory(optimizer: Optimizer) -> None:
    """Copies what `load_state_dict` has left in the file of a checkpoint (`read_checkpoint`): all on the processor, and elsewhere
    the number of steps, since it does not copy what has the device and type already."""
    for state in optimizer.state.values():
        state.update(in_memory(state))


def parameter_groups(parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """Groups the trainable parameters by part, and apart those that must not decay.

    Biases and parameters of at most one dimension (norms, gates, magnitudes) go into a group of their own, called
    `<part>/no_decay`, with `weight_decay` 0. A parameter that several parts share belongs to the first of them.

    Args:
        parts: The parts by name; the learning rate of one is its `tune.lr`, or else the optimizer's own.

    Returns:
        Groups for the first argument of an optimizer: `name`, `params`, and `lr` where the part has its own.

    Raises:
        ValueError: No part has a trainable parameter.
    """
    groups: list[dict[str, Any]] = []
    seen: set[nn.Parameter] = set()  # parameters hash by identity
    for name, part in parts.items():
        decay: list[nn.Parameter] = []
        no_decay: list[nn.Parameter] = []
        for path, parameter in part.own_named_parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                is_bias = path.rsplit(".", 1)[-1] == "bias"
                (no_decay if is_bias or len(shape_of(parameter)) <= 1 else decay).append(parameter)
        own = {} if part.tune.lr is None else {"lr": part.tune.lr}
        if decay:
            groups.append({"name": name, "params": decay, **own})
        if no_decay:
            groups.append({"name": f"{name}{NO_DECAY}", "params": no_decay, "weight_decay": 0.0, **own})
    if not groups:
        raise ValueError(
            f"nothing to train: every part is frozen ({', '.join(parts) or 'there are no parts'}). "
            "Set tune.mode to lora or full for at least one part"
        )
    return groups


def weights_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The weights that an optimizer steps, in the order of its state."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def check_takes_shares(optimizer: Optimizer) -> None:
    """Refuses an optimizer that looks at more than one value of a weight at a time, where a device has but a share of the values.

    Args:
        optimizer: One that is to step shares of weights.

    Raises:
        ValueError: It is Adafactor (of torch or transformers), Muon, LBFGS or one of bitsandbytes.
    """
    kind = type(optimizer)
    packages = {cls.__module__.split(".")[0] for cls in kind.__mro__}
    # transformers has Adafactor alone
    if isinstance(optimizer, Adafactor | Muon | LBFGS) or packages & {"bitsandbytes", "transformers"}:
        raise ValueError(
            f"model.optimizer is {kind.__module__}.{kind.__name__}, which looks at more than one value of a weight at a time, "
            "and with trainer.strategy a device has but a share of them: take one that treats each value by itself, such as "
            "torch.optim.AdamW or torch.optim.SGD, or configs/strategy/ddp.yaml, under which each device has the whole model"
        )


def clip_gradients(module: LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """Clips gradients as `trainer.gradient_clip_val` asks for, also those of a fused optimizer.

    Lightning refuses a fused one in every mixed precision, since it may take the scale off gradients itself. In bf16-mixed they
    have none, and in 16-mixed `take_scale_off` has done it.
    """
    plugin = module.trainer.precision_plugin
    if value and isinstance(plugin, MixedPrecision):
        Precision.clip_gradients(plugin, optimizer, value, GradClipAlgorithmType(algorithm or "norm"))
    else:
        module.clip_gradients(optimizer, value, algorithm)


def scheduled(optimizer: Optimizer, scheduler: Any, interval: str) -> OptimizerLRScheduler:
    """An optimizer and its scheduler, as Lightning takes the two."""
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


class WarmupCosine(LRScheduler):
    """Linear warm-up to the learning rate, then a cosine down to `min_ratio` of it; one step an optimizer step.

    At step s, counted from 0, the factor is s / warmup_steps during warm-up, so the very first step has learning rate 0;
    after it min_ratio + (1 - min_ratio) * (1 + cos(pi * p)) / 2, where p grows from 0 to 1 at `total_steps` and stays there
    (SGDR without restarts, Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5). Up to `total_steps` this is
    `get_cosine_with_min_lr_schedule_with_warmup` of transformers. A run shorter than its warm-up ends on the ramp.

    The state holds where the schedule stands, not its options: a resumed run that is made longer or shorter goes on along the
    curve of a run that has been so long from its beginning, at once.

    Args:
        optimizer: Its groups keep the proportions of their learning rates.
        total_steps: Optimizer steps of the run, warm-up included.
        warmup_steps: Optimizer steps until the full learning rate.
        min_ratio: The last learning rate as a share of the full one.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int, min_ratio: float = 0.0) -> None:
        if not 1 <= total_steps < math.inf:
            raise ValueError(
                f"total_steps is the number of optimizer steps and must be finite and at least 1, got {total_steps}: "
                "set trainer.max_steps or trainer.max_epochs"
            )
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        if not 0 <= min_ratio <= 1:
            raise ValueError(f"min_ratio is a share of the learning rate and must lie in [0, 1], got {min_ratio}")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.min_ratio = min_ratio
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rate of each group at the present step."""
        factor = warmup_cosine(self.last_epoch, **self.curve())
        return [base_lr * factor for base_lr in self.base_lrs]

    def curve(self) -> dict[str, Any]:
        """The options, which say what `warmup_cosine` is at each step."""
        return {"total_steps": self.total_steps, "warmup_steps": self.warmup_steps, "min_ratio": self.min_ratio}

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands."""
        return {name: value for name, value in super().state_dict().items() if name not in self.curve()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where a schedule stood, whose optimizer has been restored; the next step has the rate of this curve."""
        super().load_state_dict(state_dict)
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """The share of the full learning rate that a step has, counted from 0; see `WarmupCosine`."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
