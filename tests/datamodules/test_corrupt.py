"""Media that no longer show what an answer says: as large and as long as they were, and other ones."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.corrupt import MediaCorruption
from datamodules.media_audio import Waveform
from datamodules.media_video import Clip

NOISE = np.random.default_rng(5)


def clip(num_frames: int = 8) -> Clip:
    frames = NOISE.integers(256, size=(num_frames, 6, 5, 3), dtype=np.uint8)
    return Clip(frames, np.arange(num_frames) / 4)


def sound() -> Waveform:
    return Waveform((0.1 * NOISE.standard_normal(1000)).astype(np.float32), 8000)


def corrupted(medium: Any, seed: int = 1, **kinds: Any) -> Any:
    return MediaCorruption(**kinds)(medium, random.Random(seed))


@pytest.mark.parametrize("kind", ["crop", "noise"])
def test_images_keep_their_size(kind: str, picture: Callable[..., Image.Image]) -> None:
    image = picture(3, (40, 30))
    before = image.tobytes()
    one, again, other = (corrupted(image, seed, image=kind) for seed in (1, 1, 2))
    assert one.size == (40, 30) and one.mode == "RGB" and image.tobytes() == before
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert one.tobytes() != before
    assert corrupted(picture(0, (1, 1)), image=kind).size == (1, 1)


def test_a_crop_shows_a_small_part() -> None:
    """Of a picture whose colour says where one is, at most a fifth is seen."""
    y, x = np.mgrid[0:100, 0:200]
    image = Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))
    for seed in range(20):
        seen = np.asarray(corrupted(image, seed)).astype(int)
        width, height = np.ptp(seen[..., 0]), np.ptp(seen[..., 1])
        assert 0 < width * height <= 1.1 * 0.2 * 100 * 200


def test_shuffled_frames_are_the_same_frames() -> None:
    whole = clip()
    changed = corrupted(whole, video="shuffle")
    assert changed.frames_FHW3.shape == whole.frames_FHW3.shape and np.array_equal(changed.times_F, whole.times_F)
    assert not np.array_equal(changed.frames_FHW3, whole.frames_FHW3)
    assert sorted(map(bytes, changed.frames_FHW3)) == sorted(map(bytes, whole.frames_FHW3))
    assert np.array_equal(corrupted(clip(1), video="shuffle").times_F, [0.0])


def test_half_of_the_frames_are_dropped() -> None:
    whole = clip()
    changed = corrupted(whole, video="drop")
    assert changed.frames_FHW3.shape == whole.frames_FHW3.shape
    order = [next(n for n, old in enumerate(whole.frames_FHW3) if np.array_equal(old, frame)) for frame in changed.frames_FHW3]
    assert len(set(order)) == 4 and order == sorted(order)


def test_sounds_keep_their_length() -> None:
    whole = sound()
    before = whole.samples_S.copy()
    noise, backwards, cut = (corrupted(whole, audio=kind) for kind in ("noise", "reverse", "cut"))
    assert np.array_equal(whole.samples_S, before)
    assert np.array_equal(backwards.samples_S, before[::-1])
    assert {x.samples_S.shape for x in (noise, backwards, cut)} == {(1000,)} and noise.samples_S.dtype == np.float32
    assert np.std(noise.samples_S) == pytest.approx(np.std(before), rel=0.1)
    assert abs(np.corrcoef(noise.samples_S, before)[0, 1]) < 0.2
    silent = cut.samples_S == 0
    assert silent.sum() == 500 and np.array_equal(cut.samples_S[~silent], before[~silent])
    assert np.array_equal(noise.samples_S, corrupted(whole, audio="noise").samples_S)
    assert not np.array_equal(noise.samples_S, corrupted(whole, seed=2, audio="noise").samples_S)
