"""Random changes of training sounds: of the waveform, and of the log-mel that the encoder's transform makes of it.

Shape suffixes: S samples, T frames, M mel bands.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datamodules.augment import Augment
from datamodules.media_audio import Waveform


@dataclass(frozen=True)
class SpecAugment:
    """Masks of a log-mel, for its mean (SpecAugment: Park et al. 2019, arXiv 1904.08779; its time warping is left out).

    The defaults are the paper's policy for LibriSpeech, LD; 0 masks turn a kind off.

    Args:
        num_freq_masks: Masks of neighbouring mel bands.
        max_freq: Bands of such a mask, at most; the number is drawn evenly from 0.
        num_time_masks: Masks of neighbouring frames.
        max_time: Frames of such a mask, at most (100 are a second of Whisper's).
        max_time_share: And of all frames at most this share, so that a short sound does not vanish.
    """

    num_freq_masks: int = 2
    max_freq: int = 27
    num_time_masks: int = 2
    max_time: int = 100
    max_time_share: float = 0.2

    def __post_init__(self) -> None:
        for name, value in (
            ("num_freq_masks", self.num_freq_masks),
            ("max_freq", self.max_freq),
            ("num_time_masks", self.num_time_masks),
            ("max_time", self.max_time),
        ):
            if value < 0:
                raise ValueError(f"augment.spec.{name} must be 0 or more, got {value}")
        if not 0 <= self.max_time_share <= 1:
            raise ValueError(f"augment.spec.max_time_share must lie in [0, 1], got {self.max_time_share}")

    @property
    def is_random(self) -> bool:
        """False where every mask is off."""
        return self.num_freq_masks * self.max_freq + self.num_time_masks * self.max_time * self.max_time_share > 0

    def __call__(self, mel_TM: Tensor, generator: random.Random) -> Tensor:
        """Masks a log-mel; it is left as it is.

        Raises:
            ValueError: It is no log-mel, but a waveform.
        """
        if mel_TM.ndim != 2:
            raise ValueError(
                f"augment.spec masks the frames and bands of a log-mel, and the audio encoder takes a {mel_TM.ndim}-dimensional "
                "tensor instead: set augment.spec to null"
            )
        masked_TM, mean = mel_TM.clone(), mel_TM.mean()
        num_frames, num_mels = mel_TM.shape
        for _ in range(self.num_freq_masks):
            start, stop = _span(num_mels, min(self.max_freq, num_mels), generator)
            masked_TM[:, start:stop] = mean
        for _ in range(self.num_time_masks):
            start, stop = _span(num_frames, min(self.max_time, int(self.max_time_share * num_frames)), generator)
            masked_TM[start:stop] = mean
        return masked_TM


@dataclass(frozen=True)
class AudioAugment(Augment):
    """Random gain, noise and shift of a sound, and masks of its log-mel, for training only.

    Args:
        gain_db: The sound becomes louder or softer by up to this many decibels; 0 turns it off. It is not clipped.
        noise: Probability of added white noise; 0 turns it off.
        noise_snr_db: How much stronger the sound is than the noise, in decibels: lowest and highest.
        shift_seconds: The sound begins earlier or later by up to so much, but at most a tenth of its length: silence comes in
            at one end, and what leaves at the other is lost. 0 turns it off.
        spec: Masks of the log-mel; None: none.
    """

    gain_db: float = 6.0
    noise: float = 0.5
    noise_snr_db: tuple[float, float] = (15.0, 40.0)
    shift_seconds: float = 0.1
    spec: SpecAugment | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.gain_db <= 60:
            raise ValueError(f"augment.gain_db must lie in [0, 60], got {self.gain_db}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"augment.noise is a probability and must lie in [0, 1], got {self.noise}")
        low, high = self.noise_snr_db
        if not -100 <= low <= high <= 100:
            raise ValueError(f"augment.noise_snr_db must be two numbers with -100 <= low <= high <= 100, got {self.noise_snr_db}")
        if not 0 <= self.shift_seconds < float("inf"):
            raise ValueError(f"augment.shift_seconds must be 0 or more, got {self.shift_seconds}")

    @property
    def is_random(self) -> bool:
        """False where every change is off, so that a sound always stays as it is."""
        return any((self.gain_db, self.noise, self.shift_seconds)) or (self.spec is not None and self.spec.is_random)

    def __call__(self, waveform: Waveform, generator: random.Random) -> Waveform:
        """Changes a sound; the result is as long.

        Args:
            waveform: It is left as it is.
            generator: From `rng`. As much is drawn for each change, on or off, so that turning one on leaves the others as they
                were.
        """
        samples_S = waveform.samples_S
        share = generator.uniform(-1, 1)
        furthest = min(round(self.shift_seconds * waveform.sample_rate), len(samples_S) // 10)
        samples_S = _shift(samples_S, round(share * furthest))
        gain = 10 ** (generator.uniform(-self.gain_db, self.gain_db) / 20)
        samples_S = samples_S * np.float32(gain)
        is_noisy, snr_db, seed = generator.random() < self.noise, generator.uniform(*self.noise_snr_db), generator.getrandbits(64)
        if is_noisy:
            samples_S = _add_noise(samples_S, snr_db, seed)
        return replace(waveform, samples_S=samples_S)

    def change_tensor(self, tensor: Tensor, generator: random.Random) -> Tensor:
        """Masks the log-mel of a sound."""
        return tensor if self.spec is None else self.spec(tensor, generator)


def _span(length: int, most: int, generator: random.Random) -> tuple[int, int]:
    """Start and stop of a mask of 0 to `most` places within `length`."""
    width = int(generator.random() * (most + 1))
    start = int(generator.random() * (length - width + 1))
    return start, start + width


def _shift(samples_S: NDArray[np.float32], offset: int) -> NDArray[np.float32]:
    """The samples, later by `offset` (earlier where it is negative), between silence."""
    shifted_S = np.zeros_like(samples_S)
    kept = len(samples_S) - abs(offset)
    shifted_S[max(0, offset) :][:kept] = samples_S[max(0, -offset) :][:kept]
    return shifted_S


def _add_noise(samples_S: NDArray[np.float32], snr_db: float, seed: int) -> NDArray[np.float32]:
    """Adds white noise, by power `snr_db` below the sound as a whole; silence stays silent."""
    noise_S = np.random.default_rng(seed).standard_normal(len(samples_S), dtype=np.float32)
    power = float(np.square(samples_S, dtype=np.float64).mean())
    return samples_S + noise_S * np.float32((power * 10 ** (-snr_db / 10)) ** 0.5)
