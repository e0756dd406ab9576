"""Waveforms to what audio encoders take: log-mel frames, or the samples themselves.

Shape suffixes: S samples, T steps (frames, or samples), F frequencies, M mel bands.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


class Sound(Protocol):
    """A decoded sound: one channel, full scale from -1 to 1."""

    samples_S: NDArray[np.float32]
    sample_rate: int


@dataclass(frozen=True)
class LogMel:
    """The log-mel spectrogram of Whisper (Radford et al. 2022, arXiv 2212.04356), in windows, each for itself.

    Its frames are those that `WhisperFeatureExtractor` of transformers gives of each window with its default padding, up to
    where the sound ends.

    Args:
        num_mels: Mel bands.
        window: Frames of a full window, an even number.
        pad: Fill the last window with silence; False: it has an even number of frames, two for every 2 × `hop` samples begun.
        sample_rate: Samples a second.
        num_fft: Samples of a frame.
        hop: Samples from a frame to the next one.
    """

    num_mels: int
    window: int
    pad: bool = False
    sample_rate: int = 16_000
    num_fft: int = 400
    hop: int = 160
    min_samples: int = 1

    def num_steps(self, num_samples: int) -> int:
        """How many frames so many samples give."""
        unit = self.window * self.hop if self.pad else 2 * self.hop
        return -(-num_samples // unit) * unit // self.hop

    def __call__(self, sound: Sound) -> Tensor:
        """The frames of a sound, mel_TM.

        Raises:
            ValueError: It has another rate.
        """
        check_rate(sound, self.sample_rate)
        return self.frames(torch.from_numpy(sound.samples_S))

    def frames(self, samples_S: Tensor) -> Tensor:
        """The frames of a waveform, mel_TM; gradients flow back to the samples."""
        return torch.cat([self._window(part_S) for part_S in samples_S.split(self.window * self.hop)])

    def _window(self, samples_S: Tensor) -> Tensor:
        num_frames = self.num_steps(len(samples_S))
        # silence up to where no frame has sound in it any more, so that none is mirrored at the end
        length = min(num_frames * self.hop + self.num_fft, self.window * self.hop)
        padded_S = F.pad(samples_S, (0, length - len(samples_S)))
        taper_S = torch.hann_window(self.num_fft)
        spectrum_FT = torch.stft(padded_S, self.num_fft, self.hop, window=taper_S, return_complex=True)[:, :-1]
        log_TM = (spectrum_FT.abs().square().T.contiguous() @ self._mel_filters).clamp(min=1e-10).log10()
        return ((torch.maximum(log_TM, log_TM.max() - 8) + 4) / 4)[:num_frames]

    @cached_property
    def _mel_filters(self) -> Tensor:
        from transformers.audio_utils import mel_filter_bank

        filters_FM = mel_filter_bank(
            num_frequency_bins=1 + self.num_fft // 2,
            num_mel_filters=self.num_mels,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=self.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        return torch.from_numpy(filters_FM).to(torch.float32)


@dataclass(frozen=True)
class Samples:
    """The samples of a sound, for encoders that take a waveform.

    Args:
        window: Samples of a full window.
        min_samples: Samples that the encoder needs; a last window of fewer is filled with silence up to them.
        normalise: Shift the whole sound to a mean of 0, and scale it to a variance of 1.
        sample_rate: Samples a second.
    """

    window: int
    min_samples: int
    normalise: bool
    sample_rate: int = 16_000

    def num_steps(self, num_samples: int) -> int:
        """How many samples come out of so many.

        Raises:
            ValueError: They are fewer than `min_samples`.
        """
        if num_samples < self.min_samples:
            raise ValueError(
                f"the sound has {num_samples} samples at {self.sample_rate:,} a second, and the encoder needs at least "
                f"{self.min_samples} ({self.min_samples / self.sample_rate:.3f} s): leave it out, or take a longer part"
            )
        rest = num_samples % self.window
        return num_samples + (max(0, self.min_samples - rest) if rest else 0)

    def __call__(self, sound: Sound) -> Tensor:
        """The samples of a sound, samples_S.

        Raises:
            ValueError: It has another rate, or too few samples.
        """
        check_rate(sound, self.sample_rate)
        samples_S = torch.from_numpy(sound.samples_S)
        num_steps = self.num_steps(len(samples_S))
        if self.normalise:
            samples_S = (samples_S - samples_S.mean()) / (samples_S.var(correction=0) + 1e-7).sqrt()
        return F.pad(samples_S, (0, num_steps - len(samples_S)))


def check_rate(sound: Sound, sample_rate: int) -> None:
    """Refuses a sound of another rate.

    Raises:
        ValueError: It has one.
    """
    if sound.sample_rate != sample_rate:
        raise ValueError(
            f"the sound has {sound.sample_rate:,} samples a second, and the encoder takes {sample_rate:,}: "
            "decode it with the encoder's rate"
        )
