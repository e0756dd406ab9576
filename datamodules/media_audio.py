"""How a source becomes a waveform: one channel, at the rate that the encoder wants.

Shape suffixes: S samples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Waveform:
    """Sound as one channel.

    Args:
        samples_S: Amplitudes, full scale from -1 to 1.
        sample_rate: Samples a second.
    """

    samples_S: NDArray[np.float32]
    sample_rate: int

    @property
    def shape(self) -> tuple[int]:
        """Number of samples."""
        return (len(self.samples_S),)


@dataclass(frozen=True)
class AudioLimits:
    """How big a sound may be; a bigger one is an error, raised before it is decoded.

    Args:
        max_bytes: Size of the file, or of what a `data:` URI holds.
        max_seconds: Length of the sound.
    """

    max_bytes: int = 500_000_000
    max_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name, value in (("max_bytes", self.max_bytes), ("max_seconds", self.max_seconds)):
            if value <= 0:
                raise ValueError(f"limits.audio.{name} must be above 0, got {value}")
