"""Options of Lightning's trainer with which a run would learn something else, or could not go on."""

from collections.abc import Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging


def check_clipping(value: float | None) -> None:
    """Refuses a norm, or a value, to which gradients cannot be clipped.

    Args:
        value: `trainer.gradient_clip_val`; 0 and None: they are not clipped.

    Raises:
        ValueError: It is negative: Lightning takes it as off, but a factor made of it turns gradients around.
    """
    if value is not None and value < 0:
        raise ValueError(
            f"trainer.gradient_clip_val is {value}, but gradients are clipped to a positive number: set it to null or 0 to leave "
            "them as they are"
        )


def check_averaging(callbacks: Iterable[Callback]) -> None:
    """Refuses callbacks that exchange the weights of a checkpoint for averaged ones.

    Raises:
        ValueError: There is one.
    """
    for callback in callbacks:
        if isinstance(callback, WeightAveraging):
            raise ValueError(
                f"trainer.callbacks has {type(callback).__name__}, which puts averaged weights in the place of those of a "
                "checkpoint, and expects all weights in it, while ours holds what trains alone: no run could go on from it. "
                "Leave the callback out"
            )
