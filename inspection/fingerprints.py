"""Media as a few bytes by which equal ones and those that look or sound nearly the same are found.

The perceptual hash is that of the discrete cosine transform ("pHash", Zauner 2010): which of the lowest 64 frequencies of a grid
of 32 × 32 cells lie above their median. For a clip the grid holds four of its frames, for a sound its spectrogram. A hash of
grey cells does not see colour, so a sketch of 48 bytes goes with it.

Shape suffixes: F frames, S samples, W windows of sound, Q frequencies.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.media_audio import Waveform
from datamodules.media_video import Clip

GRID = 32
FLAT = 2.0
"""A grid whose standard deviation is below this, in levels of 255, has no pattern to be known by."""

SKETCH_BYTES = 48
WINDOW = 1024
MOST_WINDOWS = 8192
QUIET_DB = 60.0
"""So far below the loudest cell of a spectrogram everything counts as silence."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a medium is known by.

    Args:
        content: A digest of what was decoded: the same picture in another lossless file has the same.
        pattern: The perceptual hash, 64 bits; None: it has no pattern (one colour, silence).
        sketch: 48 bytes: of a picture the colours of 4 × 4 cells, of a clip those of 2 × 2 cells of four frames, of a sound the
            levels of 8 bands at 6 times.
    """

    content: bytes
    pattern: int | None
    sketch: bytes


def fingerprint(decoded: Image.Image | Clip | Waveform) -> Fingerprint:
    """The fingerprint of a decoded medium."""
    match decoded:
        case Clip():
            return _of_clip(decoded.frames_FHW3)
        case Waveform():
            samples_S = decoded.samples_S
            grid = Image.fromarray(spectrogram_grid(samples_S))
            return Fingerprint(_digest(samples_S), pattern(grid), _shrink(grid, 6, 8).tobytes())
        case _:
            rgb = decoded.convert("RGB")
            return Fingerprint(_digest(np.asarray(rgb)), pattern(_shrink(rgb.convert("L"))), _shrink(rgb, 4, 4).tobytes())


def pattern(grid: Image.Image) -> int | None:
    """The perceptual hash of a grey picture of 32 × 32 pixels; None where it is flat.

    Bit 63 is the constant, whose place is given to no frequency: it is 0. Bits are counted by rows of the transform.
    """
    cells = np.asarray(grid, dtype=np.float64)
    if cells.std() < FLAT:
        return None
    basis = _cosines()
    frequencies = (basis @ cells @ basis.T).ravel()
    bits = frequencies > np.median(frequencies[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def spectrogram_grid(samples_S: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A sound as 32 bands (from low to high, evenly spaced in the logarithm) at 32 times, levels from 0 to 255.

    Args:
        samples_S: At any rate; levels are relative to the loudest cell, so that gain does not matter.
    """
    samples_S = np.pad(samples_S, (0, max(0, WINDOW - len(samples_S))))
    num_windows = min(max(4 * GRID, 2 * len(samples_S) // WINDOW), MOST_WINDOWS)
    starts_W = np.linspace(0, len(samples_S) - WINDOW, num_windows).astype(np.int64)
    windows = samples_S[starts_W[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW).astype(np.float32)
    power_WQ = np.square(np.abs(np.fft.rfft(windows)))
    bands = np.geomspace(2, WINDOW // 2, GRID + 1)
    power = _means_between(_means_between(power_WQ, bands).T, np.linspace(0, num_windows, GRID + 1))
    loudest = power.max()
    if loudest <= 0:
        return np.zeros((GRID, GRID), np.uint8)
    level = 10 * np.log10(np.maximum(power / loudest, 10 ** (-QUIET_DB / 10)))
    return np.round(255 * (1 + level / QUIET_DB)).astype(np.uint8)


def _of_clip(frames_FHW3: NDArray[np.uint8]) -> Fingerprint:
    """Four frames, from the first to the last, as the quarters of one picture."""
    numbers = np.linspace(0, len(frames_FHW3) - 1, 4).round().astype(int)
    frames = [Image.fromarray(frames_FHW3[number]) for number in numbers]
    mosaic = Image.new("L", (GRID, GRID))
    half = GRID // 2
    for place, frame in enumerate(frames):
        mosaic.paste(_shrink(frame.convert("L"), half, half), (half * (place % 2), half * (place // 2)))
    sketch = b"".join(_shrink(frame, 2, 2).tobytes() for frame in frames)
    return Fingerprint(_digest(frames_FHW3), pattern(mosaic), sketch)


def _shrink(image: Image.Image, width: int = GRID, height: int = GRID) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BOX)


def _digest(array: NDArray[np.generic]) -> bytes:
    digest = hashlib.blake2b(repr((array.dtype.str, array.shape)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _means_between(values: NDArray[np.floating], edges: NDArray[np.floating]) -> NDArray[np.floating]:
    """Means of the last dimension between edges, which need not be whole numbers: (…, N) -> (…, edges - 1)."""
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1, dtype=np.float64)], axis=-1)
    low = np.minimum(np.floor(edges).astype(int), values.shape[-1] - 1)
    at_edges = sums[..., low] + (edges - low) * values[..., low]
    return np.diff(at_edges, axis=-1) / np.diff(edges)


@cache
def _cosines() -> NDArray[np.float64]:
    """The eight lowest rows of the orthonormal DCT-II of 32 values."""
    frequency, place = np.arange(8)[:, None], np.arange(GRID)[None]
    basis = np.sqrt(2 / GRID) * np.cos(np.pi * (2 * place + 1) * frequency / (2 * GRID))
    basis[0] /= np.sqrt(2)
    return basis
