import random

import numpy as np
import pytest
from PIL import Image

from datamodules.augment import ImageAugment, rng
from datamodules.augment_video import VideoAugment
from datamodules.media_video import Clip

JITTER = ImageAugment(crop_scale=(0.3, 0.6), flip=0.5, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3)
STILL = ImageAugment(crop_scale=(1, 1), brightness=0, contrast=0, saturation=0)


@pytest.fixture
def clip() -> Clip:
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    return Clip(frames, np.arange(5) / 4)


def test_all_frames_change_alike(clip: Clip) -> None:
    still = Clip(clip.frames_FHW3[:1].repeat(5, 0), clip.times_F)
    sizes = set()
    for row in range(6):
        changed = VideoAugment(images=JITTER)(still, rng(1, 0, row, 0))
        assert all(np.array_equal(frame, changed.frames_FHW3[0]) for frame in changed.frames_FHW3)
        sizes.add(changed.shape[1:])
    assert len(sizes) == 6


def test_each_frame_is_changed_as_a_picture(clip: Clip) -> None:
    changed = VideoAugment(images=JITTER)(clip, random.Random(5))
    generator = random.Random(5)
    generator.random()  # whether it is played backwards
    state = generator.getstate()
    for before, after in zip(clip.frames_FHW3, changed.frames_FHW3, strict=True):
        generator.setstate(state)
        assert np.array_equal(np.asarray(JITTER(Image.fromarray(before), generator)), after)
    assert changed.times_F is not clip and np.array_equal(changed.times_F, clip.times_F)


def test_backwards(clip: Clip) -> None:
    whole = VideoAugment(images=STILL, reverse=1.0)(clip, random.Random(0))
    assert np.array_equal(whole.frames_FHW3, clip.frames_FHW3[::-1]) and np.array_equal(whole.times_F, clip.times_F[::-1])
    some = [VideoAugment(images=STILL, reverse=0.3)(clip, random.Random(seed)).times_F[0] > 0 for seed in range(300)]
    assert 60 < sum(some) < 120
    forwards = [VideoAugment(images=STILL)(clip, random.Random(seed)).times_F[0] for seed in range(20)]
    assert set(forwards) == {0.0}


def test_it_knows_when_it_is_off() -> None:
    assert VideoAugment().is_random and VideoAugment().draws_frames
    off = VideoAugment(images=STILL, random_frames=False)
    assert not off.is_random and not off.draws_frames
    assert VideoAugment(images=STILL, random_frames=False, reverse=0.1).is_random
    assert not ImageAugment().draws_frames
    with pytest.raises(ValueError, match=r"augment\.reverse is a probability and must lie in \[0, 1\], got 1.5"):
        VideoAugment(reverse=1.5)
