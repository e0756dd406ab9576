"""What is measured of a medium to find those that teach nothing: blurred, blank, silent, clipped, black, frozen.

Shape suffixes: F frames, H height, W width, S samples.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.media_audio import Waveform
from datamodules.media_video import Clip

MEASURED_SIDE = 512
"""Pictures are measured at no more than this many pixels a side: about what encoders see, and one threshold fits all sizes."""

FROZEN_GRID = 32
"""Frames are compared as grids of so many cells a side, whose means hide the noise of a codec."""

SAME_FRAME = 2
"""Two frames are the same where no cell differs by more levels of 255 than this."""

BLACK_LEVEL = 24
"""A frame is black where 99 % of its pixels are at most this bright; black in video is 16, and codecs add a little."""

FULL_SCALE = 0.99
"""Samples from here on count as clipped where their neighbours are so loud, too."""

CLIPPED_RUN = 3
"""So many samples in a row at full scale are a flat top; a clean peak touches it once or twice."""

QUIETEST_DB = -200.0
"""What digital silence is said to measure, since the logarithm of 0 is no number of JSON."""


@dataclass(frozen=True, slots=True)
class ImageMeasures:
    """Of a picture, in grey from 0 to 255.

    Args:
        sharpness: Variance of the Laplacian (Pech-Pacheco et al. 2000); low where edges are soft.
        contrast: Standard deviation of the brightness.
        dark: 99 % of the pixels are at most this bright.
        bright: 99 % of the pixels are at least this bright.
    """

    sharpness: float
    contrast: float
    dark: float
    bright: float


@dataclass(frozen=True, slots=True)
class VideoMeasures:
    """Of a clip, by the frames that its encoder takes.

    Args:
        black_share: Share of the frames that are black.
        frozen_share: Share of the successive frames that equal the one before; 0 where there is one frame.
    """

    black_share: float
    frozen_share: float


@dataclass(frozen=True, slots=True)
class AudioMeasures:
    """Of a sound, as its encoder hears it.

    Args:
        level_db: Root mean square, in dB of full scale.
        clipped_share: Share of the samples in flat tops at full scale.
    """

    level_db: float
    clipped_share: float


Measures = ImageMeasures | VideoMeasures | AudioMeasures


def measure(decoded: Image.Image | Clip | Waveform) -> Measures:
    """The measures of a medium."""
    match decoded:
        case Clip():
            return measure_video(decoded.frames_FHW3)
        case Waveform():
            return measure_audio(decoded.samples_S)
        case _:
            return measure_image(decoded)


def measure_image(image: Image.Image) -> ImageMeasures:
    """Measures a picture.

    Args:
        image: RGB or grey, of any size.
    """
    grey = image.convert("L")
    grey.thumbnail((MEASURED_SIDE, MEASURED_SIDE), Image.Resampling.BILINEAR)
    grey_HW = np.asarray(grey, dtype=np.float32)
    bright, dark = np.percentile(grey_HW, (1, 99))
    return ImageMeasures(laplacian_variance(grey_HW), float(grey_HW.std()), float(dark), float(bright))


def laplacian_variance(grey_HW: NDArray[np.float32]) -> float:
    """Variance of the Laplacian: four neighbours minus four times the pixel, without the border.

    Args:
        grey_HW: Brightness; of a picture below 3 × 3 pixels it is 0.
    """
    if min(grey_HW.shape) < 3:
        return 0.0
    inner_HW = grey_HW[1:-1, 1:-1]
    around_HW = grey_HW[:-2, 1:-1] + grey_HW[2:, 1:-1] + grey_HW[1:-1, :-2] + grey_HW[1:-1, 2:]
    return float((around_HW - 4 * inner_HW).var(dtype=np.float64))


def measure_video(frames_FHW3: NDArray[np.uint8]) -> VideoMeasures:
    """Measures a clip.

    Args:
        frames_FHW3: RGB.
    """
    greys = [Image.fromarray(frame_HW3).convert("L") for frame_HW3 in frames_FHW3]
    black = [float(np.percentile(np.asarray(grey), 99)) <= BLACK_LEVEL for grey in greys]
    size = (FROZEN_GRID, FROZEN_GRID)
    cells = [np.asarray(grey.resize(size, Image.Resampling.BOX), dtype=np.int16) for grey in greys]
    same = [int(np.abs(after - before).max()) <= SAME_FRAME for before, after in itertools.pairwise(cells)]
    return VideoMeasures(float(np.mean(black)), float(np.mean(same)) if same else 0.0)


def measure_audio(samples_S: NDArray[np.float32]) -> AudioMeasures:
    """Measures a sound.

    Args:
        samples_S: Amplitudes, full scale from -1 to 1.
    """
    power = float(np.mean(np.square(samples_S, dtype=np.float64)))
    level_db = max(10 * float(np.log10(power)), QUIETEST_DB) if power > 0 else QUIETEST_DB
    return AudioMeasures(level_db, _share_in_runs(np.abs(samples_S) >= FULL_SCALE, CLIPPED_RUN))


def _share_in_runs(loud_S: NDArray[np.bool_], shortest: int) -> float:
    """Share of all samples that lie in runs of at least `shortest` true ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud_S, [False]]).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    return float(lengths[lengths >= shortest].sum() / len(loud_S))
