"""Media that no longer show what an answer says: for objectives that compare an answer before right and wrong media.

Shape suffixes: F frames, S samples, H height, W width.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from datamodules.media import Decoded
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip


@dataclass(frozen=True)
class MediaCorruption:
    """How media are corrupted (mDPO: Wang et al. 2024, arXiv 2406.11839, section 3.2). Each keeps its size and its length.

    Args:
        image: `crop`: a random part of 1 to 20 % of its area, enlarged (the paper's); `noise`: random pixels; `other`: the image
            of another row of the file, drawn at random.
        video: `shuffle`: its frames in a random order; `drop`: a random half of them, each shown until the next one.
        audio: `noise`: white noise, as loud as the sound; `reverse`: backwards; `cut`: silence in the place of a random half.
    """

    image: Literal["crop", "noise", "other"] = "crop"
    video: Literal["shuffle", "drop"] = "shuffle"
    audio: Literal["noise", "reverse", "cut"] = "reverse"

    def __call__(self, decoded: Decoded, generator: random.Random) -> Decoded:
        """A corrupted copy; what it was given stays as it is. `other` is for the caller, who knows the other rows.

        Args:
            decoded: A medium.
            generator: From `augment.rng`.
        """
        match decoded:
            case Clip():
                return _corrupt_clip(decoded, self.video, generator)
            case Waveform():
                return _corrupt_sound(decoded, self.audio, generator)
        return _crop(decoded, generator) if self.image == "crop" else _noise(decoded, generator)


def _crop(image: Image.Image, generator: random.Random) -> Image.Image:
    area, ratio = generator.uniform(0.01, 0.2), math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(image.width, max(1, round(image.width * math.sqrt(area * ratio))))
    height = min(image.height, max(1, round(image.height * math.sqrt(area / ratio))))
    left = generator.randint(0, image.width - width)
    top = generator.randint(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def _noise(image: Image.Image, generator: random.Random) -> Image.Image:
    return Image.frombytes("RGB", image.size, generator.randbytes(3 * image.width * image.height))


def _corrupt_clip(clip: Clip, kind: Literal["shuffle", "drop"], generator: random.Random) -> Clip:
    num_frames = len(clip.frames_FHW3)
    order = [*range(num_frames)]
    if kind == "shuffle":
        while order == [*range(num_frames)] and num_frames > 1:
            generator.shuffle(order)
    else:
        kept = sorted(generator.sample(order, math.ceil(num_frames / 2)))
        order = [max((frame for frame in kept if frame <= place), default=kept[0]) for place in order]
    return Clip(clip.frames_FHW3[order], clip.times_F)


def _corrupt_sound(sound: Waveform, kind: Literal["noise", "reverse", "cut"], generator: random.Random) -> Waveform:
    samples_S = sound.samples_S
    match kind:
        case "noise":
            loudness = float(np.sqrt(np.mean(np.square(samples_S)))) if len(samples_S) else 0.0
            noise_S = np.random.default_rng(generator.getrandbits(64)).standard_normal(len(samples_S), dtype=np.float32)
            changed_S = np.clip(noise_S * np.float32(loudness), -1, 1)
        case "reverse":
            changed_S = np.ascontiguousarray(samples_S[::-1])
        case "cut":
            half = len(samples_S) // 2
            start = generator.randint(0, len(samples_S) - half)
            changed_S = samples_S.copy()
            changed_S[start : start + half] = 0
    return Waveform(changed_S, sound.sample_rate)
