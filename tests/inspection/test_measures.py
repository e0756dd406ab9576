"""Measures of images, clips and sounds: by hand, against SciPy, and on media that are worse than others."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from inspection.measures import laplacian_variance, measure_audio, measure_image, measure_video
from tests.inspection.planted import melody, mosaic


def test_the_variance_of_the_laplacian_is_that_of_scipy() -> None:
    grey_HW = np.random.default_rng(3).uniform(0, 255, (37, 51)).astype(np.float32)
    expected = ndimage.laplace(grey_HW.astype(np.float64))[1:-1, 1:-1].var()
    assert laplacian_variance(grey_HW) == pytest.approx(expected, rel=1e-6)


def test_the_variance_of_the_laplacian_by_hand() -> None:
    grey_HW = np.zeros((3, 4), dtype=np.float32)
    grey_HW[1, 1] = 1  # the two inner pixels give -4 and 1
    assert laplacian_variance(grey_HW) == 6.25
    assert laplacian_variance(grey_HW[:2]) == 0


def test_blur_lowers_the_sharpness_at_any_size() -> None:
    for side in (96, 1200):
        sharp = mosaic(1, side)
        soft = sharp.filter(ImageFilter.GaussianBlur(side / 40))
        assert measure_image(sharp).sharpness > 100
        assert measure_image(soft).sharpness < 20


def test_brightness_by_hand() -> None:
    grey_HW = np.full((10, 100), 40, dtype=np.uint8)
    grey_HW[0, :9] = 255  # fewer than 1 % of the pixels
    measures = measure_image(Image.fromarray(grey_HW))
    assert (measures.dark, measures.bright) == (40, 40)
    grey_HW[:, :50] = 240
    measures = measure_image(Image.fromarray(grey_HW))
    assert (measures.dark, measures.bright, measures.contrast) == (240, 40, 100)


def test_the_level_of_a_sound_by_hand() -> None:
    time_S = np.arange(16_000, dtype=np.float32)
    assert measure_audio(0.5 * np.sin(2 * np.pi * time_S / 160)).level_db == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)))
    assert measure_audio(np.zeros(10, dtype=np.float32)).level_db == -200


def test_clipped_are_runs_of_three_and_more() -> None:
    samples_S = np.array([0, 1, 1, 0, -1, -1, -1, 0.5, 1, 1, 1, 1], dtype=np.float32)
    assert measure_audio(samples_S).clipped_share == pytest.approx(7 / 12)
    assert measure_audio(samples_S[:4]).clipped_share == 0


@pytest.mark.parametrize(("gain", "is_clipped"), [(1.9, False), (3.0, True), (10.0, True)])
def test_a_sound_that_is_too_loud_is_clipped_at_another_rate_too(gain: float, is_clipped: bool) -> None:
    from datamodules.media_audio import resample

    loud_S = np.clip(gain * melody(3), -1, 1)
    assert (measure_audio(loud_S).clipped_share > 0.001) == is_clipped
    assert (measure_audio(resample(loud_S, 44_100, 16_000)).clipped_share > 0.001) == is_clipped


def test_black_and_frozen_frames_are_counted() -> None:
    frames_FHW3 = np.random.default_rng(0).integers(0, 256, (4, 64, 48, 3), dtype=np.uint8)
    measures = measure_video(frames_FHW3)
    assert (measures.black_share, measures.frozen_share) == (0, 0)
    frames_FHW3[1] = 10
    assert measure_video(frames_FHW3).black_share == 0.25
    frames_FHW3[3] = frames_FHW3[2] // 2 * 2  # one level of noise
    assert measure_video(frames_FHW3).frozen_share == pytest.approx(1 / 3)
    assert measure_video(frames_FHW3[:1]).frozen_share == 0


def test_a_small_thing_that_moves_is_no_frozen_video() -> None:
    frames_FHW3 = np.full((2, 240, 320, 3), 30, dtype=np.uint8)
    frames_FHW3[0, 100:106, 100:106] = frames_FHW3[1, 108:114, 108:114] = 220
    assert measure_video(frames_FHW3).frozen_share == 0
