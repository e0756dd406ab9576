"""The precision of a run."""

from typing import Any

from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision


def precision_of(name: Any) -> Precision:
    """Lightning's plugin of `trainer.precision`.

    Raises:
        ValueError: It is not known here.
    """
    match str(name or "32-true"):
        case "32" | "32-true":
            return Precision()
        case "bf16" | "bf16-mixed":
            return MixedPrecision("bf16-mixed", "cpu")
        case "16" | "16-mixed":
            return MixedPrecision("16-mixed", "cpu")
        case "bf16-true":
            return HalfPrecision("bf16-true")
        case "16-true":
            return HalfPrecision("16-true")
    raise ValueError(f"trainer.precision is {name}: plan knows 32-true, bf16-mixed, 16-mixed, bf16-true and 16-true")
