"""Fingerprints: the transform against SciPy's; they hold where a file is written anew, and not where it is another one."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import fft

from datamodules.media_audio import Waveform, resample
from datamodules.media_video import Clip
from inspection.fingerprints import Fingerprint, fingerprint, pattern, spectrogram_grid
from tests.inspection.planted import film, melody, mosaic


def distance(one: Fingerprint, other: Fingerprint) -> int:
    assert one.pattern is not None
    assert other.pattern is not None
    return (one.pattern ^ other.pattern).bit_count()


def colours(one: Fingerprint, other: Fingerprint) -> float:
    pairs = zip(one.sketch, other.sketch, strict=True)
    return float(np.mean([abs(a - b) for a, b in pairs]))


def as_jpeg(image: Image.Image, quality: int = 70) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def test_the_bits_are_those_of_scipys_transform() -> None:
    cells = np.random.default_rng(7).integers(0, 256, (32, 32), dtype=np.uint8)
    low = fft.dctn(cells.astype(float), norm="ortho")[:8, :8].ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    assert pattern(Image.fromarray(cells)) == int("".join("01"[bit] for bit in bits), 2)


def test_a_flat_picture_has_no_pattern() -> None:
    assert fingerprint(Image.new("RGB", (50, 60), (9, 90, 200))).pattern is None
    assert fingerprint(Waveform(np.zeros(5000, dtype=np.float32), 16_000)).pattern is None


@pytest.mark.parametrize("seed", range(6))
def test_a_picture_that_is_written_anew_is_near_and_another_is_not(seed: int) -> None:
    one = fingerprint(mosaic(seed))
    small = as_jpeg(mosaic(seed).resize((61, 70), Image.Resampling.BILINEAR))
    assert distance(one, fingerprint(small)) <= 6
    assert colours(one, fingerprint(small)) <= 10
    assert fingerprint(small).content != one.content
    assert fingerprint(mosaic(seed).copy()) == one
    other = fingerprint(mosaic(seed + 100))
    assert distance(one, other) > 12


def test_another_colour_is_seen_by_the_sketch_alone() -> None:
    picture = mosaic(3)
    red, green, blue = picture.split()
    turned = Image.merge("RGB", (green, red, blue))
    grey = Image.merge("RGB", [picture.convert("L")] * 3)
    assert distance(fingerprint(picture), fingerprint(grey)) <= 2
    assert colours(fingerprint(picture), fingerprint(grey)) > 10
    assert colours(fingerprint(picture), fingerprint(turned)) > 10


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_is_known_by_its_spectrogram_whatever_its_gain_and_rate(seed: int) -> None:
    one = fingerprint(Waveform(melody(seed), 16_000))
    noise = np.random.default_rng(seed).normal(0, 1e-3, 16_000).astype(np.float32)
    again_S = resample(resample(0.4 * melody(seed) + noise, 16_000, 22_050), 22_050, 16_000)
    again = fingerprint(Waveform(again_S, 16_000))
    assert distance(one, again) <= 6
    assert colours(one, again) <= 10
    assert distance(one, fingerprint(Waveform(melody(seed + 50), 16_000))) > 10


def test_a_tone_lies_in_its_band() -> None:
    time_S = np.arange(16_000) / 16_000
    grid = spectrogram_grid(np.sin(2 * np.pi * 1000 * time_S).astype(np.float32))
    assert grid.shape == (32, 32)
    band = 32 * np.log(64 / 2) / np.log(512 / 2)  # 1,000 Hz is bin 64 of the transform
    assert set(grid.argmax(axis=0)) == {int(band)}
    assert grid.max() == 255


@pytest.mark.parametrize("num_samples", [40, 100, 1024, 1500, 16_000 * 40])
def test_a_sound_of_any_length_has_a_grid(num_samples: int) -> None:
    samples_S = np.random.default_rng(1).normal(0, 0.1, num_samples).astype(np.float32)
    assert spectrogram_grid(samples_S).max() == 255


def test_a_clip_is_known_by_what_moves() -> None:
    times_F = np.arange(16) / 8
    one, other = fingerprint(Clip(film(0), times_F)), fingerprint(Clip(film(1), times_F))
    noisy = np.clip(film(0).astype(int) + np.random.default_rng(2).integers(-6, 7, film(0).shape), 0, 255).astype(np.uint8)
    again = fingerprint(Clip(noisy, times_F))
    assert distance(one, again) <= 6
    assert colours(one, again) <= 10
    assert distance(one, other) > 6 or colours(one, other) > 10
    backwards = fingerprint(Clip(film(0)[::-1], times_F))
    assert distance(one, backwards) > 6
