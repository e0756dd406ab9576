"""How a source becomes a waveform: one channel, at the rate that the encoder wants.

Shape suffixes: S samples.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datamodules.audio_readers import SoundReader, open_sound
from datamodules.call import Call, call_here
from datamodules.sources import MediaError, MediaRoot, media_name, resolve, time_span

MAX_AMPLITUDE = 100.0
"""Far above full scale: samples beyond it are numbers of another scale, such as 16-bit integers stored as floats."""

MAX_KERNEL = 1 << 24
"""Numbers in torchaudio's table of filters; it grows with both rates divided by what divides both."""


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
        max_seconds: Length of the part that is taken.
        max_decode_seconds: How long reading one may take; to be raised where the disk is far away.
        max_memory_bytes: How much memory reading one may take.
    """

    max_bytes: int = 500_000_000
    max_seconds: float = 3600.0
    max_decode_seconds: float = 60.0
    max_memory_bytes: int = 4_000_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"limits.audio.{name} must be above 0, got {value}")


@dataclass(frozen=True)
class AudioHeader:
    """What is known of a sound without decoding it.

    Args:
        name: The source, for errors.
        sample_rate: Samples a second, of the file.
        num_channels: Channels, of the file.
        start: Number of the first sample of the part that is taken.
        stop: Number of the sample after its last one.
    """

    name: str
    sample_rate: int
    num_channels: int
    start: int
    stop: int

    @property
    def seconds(self) -> float:
        """Length of the part."""
        return (self.stop - self.start) / self.sample_rate

    def shape(self, sample_rate: int, min_samples: int = 1) -> tuple[int]:
        """Number of samples of the part at another rate, exactly as many as `decode_audio` gives.

        Args:
            sample_rate: Samples a second.
            min_samples: What the encoder needs.

        Raises:
            MediaError: There are fewer, or the two rates have no table of filters of a sensible size.
        """
        if _kernel_size(self.sample_rate, sample_rate) > MAX_KERNEL:
            raise MediaError(
                f"{self.name} has {self.sample_rate:,} samples a second, which share too few divisors with the {sample_rate:,} "
                f"of the encoder to be resampled: convert it to {sample_rate:,} before"
            )
        num_samples = num_resampled(self.stop - self.start, self.sample_rate, sample_rate)
        if num_samples < min_samples:
            raise MediaError(
                f"{self.name} is {num_samples} samples long at {sample_rate:,} a second, and the encoder needs at least "
                f"{min_samples} ({min_samples / sample_rate:.3f} s): leave the row out, or take a longer part"
            )
        return (num_samples,)


def probe_audio(
    source: str, media_root: MediaRoot, limits: AudioLimits, start: float = 0.0, end: float | None = None
) -> AudioHeader:
    """What is known of a sound, or of the part of it from `start` to `end`, without decoding it.

    Raises:
        MediaError: The source cannot be used, its header cannot be read, or the part is not in it.
    """
    with _open_part(source, media_root, limits, start, end) as (_, header):
        return header


def decode_audio(
    source: str,
    media_root: MediaRoot,
    limits: AudioLimits,
    sample_rate: int,
    min_samples: int = 1,
    start: float = 0.0,
    end: float | None = None,
    call: Call = call_here,
) -> Waveform:
    """Decodes a sound: the mean of its channels, resampled if need be.

    A part is cut out first, by seeking, to the nearest sample, and then resampled as if it were a file of its own. Of several
    sound tracks the main one is taken.

    Args:
        source: As the row has it; a video, too.
        media_root: The folder that paths are below.
        limits: How big it may be.
        sample_rate: Samples a second of the result.
        min_samples: Fewer of them are an error.
        start: Where the part that is taken begins, in seconds.
        end: Where it ends; None: where the sound does.
        call: Calls what reads the file.

    Raises:
        MediaError: The source cannot be used or decoded whole, or holds numbers that are no amplitudes.
    """
    read = call(read_sound, source, media_root, limits, sample_rate, min_samples, start, end)
    return Waveform(resample(read.samples_S, read.sample_rate, sample_rate), sample_rate)


def read_sound(
    source: str,
    media_root: MediaRoot,
    limits: AudioLimits,
    sample_rate: int,
    min_samples: int,
    start: float,
    end: float | None,
) -> Waveform:
    """Decodes a sound as `decode_audio`, at the rate that it has, if it can be resampled to `sample_rate`.

    Raises:
        MediaError: As `decode_audio`.
    """
    with _open_part(source, media_root, limits, start, end) as (sound, header):
        header.shape(sample_rate, min_samples)
        samples_S = sound.read(header.start, header.stop)
    _check_amplitudes(header.name, samples_S)
    return Waveform(samples_S, header.sample_rate)


def resample(samples_S: NDArray[np.float32], rate: int, new_rate: int) -> NDArray[np.float32]:
    """Resamples by torchaudio's `resample`: windowed sinc interpolation (Hann, 6 zero crossings, cut at 0.99 of Nyquist).

    The same bits come out in every process, however many threads it has.

    Args:
        samples_S: At `rate` samples a second.
        rate: Samples a second.
        new_rate: Samples a second of the result, which has `num_resampled` samples. (torchaudio's own ceiling is taken in
            float32, and may be a sample short.)
    """
    if rate == new_rate:
        return samples_S
    import torch
    from torchaudio.functional import resample as torch_resample

    divisor = math.gcd(rate, new_rate)
    silence = (1 + 256 // (new_rate // divisor)) * (rate // divisor)  # so that no sample is missing at the end
    padded_S = torch.nn.functional.pad(torch.from_numpy(samples_S), (0, silence))
    return torch_resample(padded_S, rate, new_rate).numpy()[: num_resampled(len(samples_S), rate, new_rate)]


def num_resampled(num_samples: int, rate: int, new_rate: int) -> int:
    """Samples after resampling: num_samples × new_rate / rate, rounded up."""
    return -(-num_samples * new_rate // rate)


def _kernel_size(rate: int, new_rate: int) -> int:
    """Numbers in torchaudio's table of filters, one filter for each phase of the new rate."""
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    return new * (2 * math.ceil(6 * old / (0.99 * min(old, new))) + old)


@contextmanager
def _open_part(
    source: str, media_root: MediaRoot, limits: AudioLimits, start: float, end: float | None
) -> Iterator[tuple[SoundReader, AudioHeader]]:
    name = media_name(source)
    with open_sound(resolve(source, media_root, "audio", limits.max_bytes), name) as sound:
        rate = sound.sample_rate
        if rate <= 0 or sound.num_samples <= 0:
            raise MediaError(f"{name} has no samples ({sound.num_samples} at {rate} a second)")
        first, last = time_span(name, start, end, sound.num_samples / rate)
        header = AudioHeader(name, rate, sound.num_channels, round(first * rate), min(round(last * rate), sound.num_samples))
        if header.seconds > limits.max_seconds:
            raise MediaError(f"{name} lasts {header.seconds:,.2f} s, above max_seconds = {limits.max_seconds:g}")
        if header.stop <= header.start:
            raise MediaError(f"{name}: no sample lies between start = {start:g} and end = {end}")
        yield sound, header


def _check_amplitudes(name: str, samples_S: NDArray[np.float32]) -> None:
    largest = float(np.abs(samples_S).max())  # NaN if one of them is
    if not largest <= MAX_AMPLITUDE:
        what = f"samples up to {largest:g}" if math.isfinite(largest) else "samples that are infinite or no numbers"
        raise MediaError(
            f"{name} has {what}, where full scale is from -1 to 1: write it again, as 16-bit integers or as floats in it"
        )
