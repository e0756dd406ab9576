import random

import numpy as np
import pytest
import torch

from datamodules.augment import rng
from datamodules.augment_audio import AudioAugment, SpecAugment
from datamodules.media_audio import Waveform

OFF = {"gain_db": 0.0, "noise": 0.0, "shift_seconds": 0.0}


def waveform(num_samples: int = 16_000) -> Waveform:
    return Waveform(np.random.default_rng(3).uniform(-0.5, 0.5, num_samples).astype(np.float32), 16_000)


def draws(augment: AudioAugment, sound: Waveform, count: int = 200) -> list[np.ndarray]:
    return [augment(sound, rng(3, epoch, row=5, occurrence=0)).samples_S for epoch in range(count)]


def mel(num_frames: int = 400, num_mels: int = 80) -> torch.Tensor:
    return torch.randn(num_frames, num_mels, generator=torch.Generator().manual_seed(1))


def masks(augment: SpecAugment, mel_TM: torch.Tensor, count: int = 200) -> list[torch.Tensor]:
    """Which places of the log-mel were masked, by draw."""
    return [augment(mel_TM, random.Random(seed)) != mel_TM for seed in range(count)]


def test_the_same_generator_gives_the_same_sound_and_leaves_the_given_one() -> None:
    sound, everything = waveform(), AudioAugment(noise=1.0, spec=SpecAugment())
    before = sound.samples_S.copy()
    first, second = draws(everything, sound, 20), draws(everything, sound, 20)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert len({one.tobytes() for one in first}) == 20
    assert all(one.shape == before.shape and one.dtype == np.float32 for one in first)
    assert np.array_equal(sound.samples_S, before)
    given = mel()
    kept = given.clone()
    assert torch.equal(everything.change_tensor(given, rng(0, 1, 2, 3)), everything.change_tensor(given, rng(0, 1, 2, 3)))
    assert torch.equal(given, kept)


def test_gain_lies_within_its_decibels() -> None:
    sound = waveform()
    gains = [20 * np.log10((made / sound.samples_S).mean()) for made in draws(AudioAugment(**OFF | {"gain_db": 6.0}), sound)]
    assert -6.01 < min(gains) < -5.5 and 5.5 < max(gains) < 6.01
    assert abs(np.mean(gains)) < 1


def test_noise_has_the_power_that_is_asked_for_as_often_as_asked() -> None:
    sound = waveform()
    ratios = []
    for made in draws(AudioAugment(**OFF | {"noise": 0.25, "noise_snr_db": (10.0, 30.0)}), sound, 400):
        if not np.array_equal(made, sound.samples_S):
            noise = made.astype(np.float64) - sound.samples_S
            ratios.append(10 * np.log10(np.square(sound.samples_S, dtype=np.float64).mean() / np.square(noise).mean()))
            assert abs(noise.mean()) < 0.05 * noise.std()
    assert 70 < len(ratios) < 130
    assert 9.9 < min(ratios) < 12 and 28 < max(ratios) < 30.1


def test_silence_stays_silent() -> None:
    silent = Waveform(np.zeros(1000, dtype=np.float32), 16_000)
    assert not any(made.any() for made in draws(AudioAugment(noise=1.0), silent, 20))


def test_a_shift_moves_the_sound_between_silence() -> None:
    sound = waveform()
    samples_S, offsets = sound.samples_S, set()
    for made in draws(AudioAugment(**OFF | {"shift_seconds": 0.05}), sound):
        offset = next(
            n
            for n in range(-800, 801)
            if np.array_equal(made[max(0, n) :][: 16_000 - abs(n)], samples_S[max(0, -n) :][: 16_000 - abs(n)])
        )
        assert not made[:offset].any() if offset >= 0 else not made[offset:].any()
        offsets.add(offset)
    assert min(offsets) < -700 and max(offsets) > 700 and len(offsets) > 150
    short = waveform(100)  # at most a tenth of a sound is lost
    assert all(np.count_nonzero(made) >= 90 for made in draws(AudioAugment(**OFF | {"shift_seconds": 9.0}), short))


def test_turning_a_change_on_leaves_the_others_as_they_were() -> None:
    sound = waveform()
    louder, noisy = AudioAugment(**OFF | {"gain_db": 6.0}), AudioAugment(**OFF | {"gain_db": 6.0, "noise": 1.0})
    for plain, made in zip(draws(louder, sound, 20), draws(noisy, sound, 20), strict=True):
        assert 0 < np.abs(plain - made).max() < 1 and np.corrcoef(plain, made)[0, 1] > 0.97


@pytest.mark.parametrize("num_frames", [1, 40, 400, 3000])
def test_masks_are_whole_bands_and_frames_of_at_most_their_size(num_frames: int) -> None:
    given = mel(num_frames)
    bands, frames = [], []
    for masked in masks(SpecAugment(num_freq_masks=1, num_time_masks=0), given):
        assert torch.equal(masked, masked[:1].expand_as(masked))
        bands.append(int(masked[0].sum()))
        assert int((masked[0].int().diff() == 1).sum()) <= 1  # in one piece
    for masked in masks(SpecAugment(num_freq_masks=0, num_time_masks=1), given):
        assert torch.equal(masked, masked[:, :1].expand_as(masked))
        frames.append(int(masked[:, 0].sum()))
    most = min(100, num_frames // 5)
    assert min(bands) == 0 and max(bands) == 27 and 12 < np.mean(bands) < 15
    assert min(frames) == 0 and max(frames) <= most and max(frames) >= 0.95 * most


def test_what_is_masked_is_the_mean() -> None:
    given = mel()
    made = SpecAugment(num_freq_masks=3, num_time_masks=3)(given, random.Random(4))
    masked = made != given
    assert 0.1 < masked.float().mean() < 0.9
    assert torch.equal(made[masked], given.mean().expand(int(masked.sum())))


def test_a_waveform_cannot_be_masked() -> None:
    augment = AudioAugment(spec=SpecAugment())
    with pytest.raises(
        ValueError, match=r"augment\.spec masks .* takes a 1-dimensional tensor instead: set augment\.spec to null"
    ):
        augment.change_tensor(torch.zeros(100), random.Random(0))


def test_is_random_only_if_something_is_on() -> None:
    sound = waveform()
    assert not AudioAugment(**OFF).is_random
    assert all(np.array_equal(made, sound.samples_S) for made in draws(AudioAugment(**OFF), sound, 20))
    for option in ({"gain_db": 1.0}, {"noise": 0.1}, {"shift_seconds": 0.1}, {"spec": SpecAugment()}):
        assert AudioAugment(**OFF | option).is_random
    assert not AudioAugment(**OFF, spec=SpecAugment(num_freq_masks=0, num_time_masks=0)).is_random


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gain_db", -1.0),
        ("gain_db", float("nan")),
        ("noise", 1.5),
        ("noise_snr_db", (20.0, 10.0)),
        ("noise_snr_db", (float("nan"), 10.0)),
        ("shift_seconds", -0.1),
        ("shift_seconds", float("inf")),
        ("spec.num_freq_masks", -1),
        ("spec.max_time", -1),
        ("spec.max_time_share", 1.5),
    ],
)
def test_an_option_out_of_range_is_named(option: str, value: float) -> None:
    kind = SpecAugment if option.startswith("spec.") else AudioAugment
    with pytest.raises(ValueError, match=rf"augment\.{option} .*got"):
        kind(**{option.removeprefix("spec."): value})
