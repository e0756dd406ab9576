import colorsys
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.augment import ImageAugment, rng

OFF = {"crop_scale": (1.0, 1.0), "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
EVERYTHING = ImageAugment(crop_scale=(0.3, 0.9), flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)


def noise(height: int, width: int) -> Image.Image:
    generator = torch.Generator().manual_seed(7)
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())


def coordinates(height: int, width: int) -> Image.Image:
    """Each pixel says where it lies: red is its column, green its row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def flat(*rgb: int) -> Image.Image:
    return Image.new("RGB", (4, 3), rgb)


def draws(augment: ImageAugment, image: Image.Image, count: int = 200) -> list[np.ndarray]:
    return [np.asarray(augment(image, rng(3, epoch, row=5, occurrence=0))) for epoch in range(count)]


def test_rng_never_changes() -> None:
    # Written down once: another value would be another augmentation in a run that is resumed or repeated.
    assert rng(0, 0, 0, 0).random() == 0.16404456654241995
    assert rng(5, 1, 2, 3).random() == 0.31387490523234096


def test_the_same_key_gives_the_same_image_in_any_order_and_process() -> None:
    keys = [(seed, epoch, row, n) for seed in (0, 4) for epoch in (0, 1) for row in (0, 12) for n in (0, 1)]
    image = noise(20, 30)
    made = {key: EVERYTHING(image, rng(*key)).tobytes() for key in keys}
    assert len(set(made.values())) == len(keys)  # seed, epoch, row and occurrence each count

    order = list(keys)
    random.Random(1).shuffle(order)
    assert {key: EVERYTHING(image, rng(*key)).tobytes() for key in order} == made

    code = f"from datamodules.augment import rng; print([rng(*key).random() for key in {keys}])"
    folder = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([rng(*key).random() for key in keys])


def test_the_image_given_is_left_as_it_is() -> None:
    image = noise(20, 30)
    before = image.tobytes()
    draws(EVERYTHING, image, count=5)
    assert image.tobytes() == before


@pytest.mark.parametrize(("height", "width"), [(200, 150), (25, 250), (250, 20)])
def test_a_crop_is_a_part_of_the_image_with_area_and_ratio_in_range(height: int, width: int) -> None:
    augment = ImageAugment(**OFF | {"crop_scale": (0.5, 0.9), "crop_ratio": (0.8, 1.25)})
    scales, ratios, corners = [], [], set()
    for crop in draws(augment, coordinates(height, width)):
        left, top = (int(value) for value in crop[0, 0, :2])
        crop_height, crop_width = crop.shape[:2]
        expected = np.asarray(coordinates(height, width))[top : top + crop_height, left : left + crop_width]
        assert np.array_equal(crop, expected)
        half_pixel = (crop_width + 0.5) * (crop_height + 0.5) - crop_width * crop_height
        assert 0.5 * height * width - half_pixel <= crop_height * crop_width <= 0.9 * height * width + half_pixel
        assert (crop_width - 0.5) / width <= 1.25 * (crop_height + 0.5) / height
        assert (crop_width + 0.5) / width >= 0.8 * (crop_height - 0.5) / height
        scales.append(crop_height * crop_width / (height * width))
        ratios.append((crop_width / width) / (crop_height / height))
        corners.add((left, top))
    assert min(scales) < 0.55 and max(scales) > 0.85  # the whole range is drawn from
    assert min(ratios) < 0.9 and max(ratios) > 1.1
    assert len(corners) > 100


def test_the_smallest_image_can_be_augmented() -> None:
    assert all(result.shape == (1, 1, 3) for result in draws(EVERYTHING, flat(9, 9, 9).resize((1, 1)), count=20))


def test_no_image_is_mirrored_unless_asked() -> None:
    image = coordinates(40, 60)
    assert all((np.diff(result[..., 0].astype(int), axis=1) > 0).all() for result in draws(ImageAugment(**OFF), image))
    never = ImageAugment(crop_scale=(0.5, 1.0), brightness=0.0, contrast=0.0, saturation=0.0)
    assert all((np.diff(result[..., 0].astype(int), axis=1) > 0).all() for result in draws(never, image))
    always = ImageAugment(flip=1.0, **OFF)
    assert all(np.array_equal(result, np.asarray(image)[:, ::-1]) for result in draws(always, image, count=20))
    mirrored = [bool(result[0, 0, 0]) for result in draws(ImageAugment(flip=0.25, **OFF), image)]
    assert 0.15 < sum(mirrored) / 200 < 0.35


def test_brightness_stays_within_its_range() -> None:
    values = [float(result.mean()) / 100 for result in draws(ImageAugment(**OFF | {"brightness": 0.2}), flat(100, 100, 100))]
    assert 0.79 <= min(values) < 0.83 and 1.17 < max(values) <= 1.21


def test_contrast_stays_within_its_range() -> None:
    image = coordinates(2, 2).point([50, 150] + [0] * 254 + [50, 150] + [0] * 254 + [100] * 256)
    spans = [np.ptp(result[..., 0].astype(int)) / 100 for result in draws(ImageAugment(**OFF | {"contrast": 0.2}), image)]
    assert 0.78 <= min(spans) < 0.83 and 1.17 < max(spans) <= 1.22


def test_saturation_stays_within_its_range() -> None:
    augment = ImageAugment(**OFF | {"saturation": 0.2})
    spans = [np.ptp(result[0, 0].astype(int)) / 100 for result in draws(augment, flat(150, 100, 50))]
    assert 0.78 <= min(spans) < 0.83 and 1.17 < max(spans) <= 1.22
    assert all((result == 77).all() for result in draws(augment, flat(77, 77, 77), count=20))


def test_hue_turns_within_its_range_and_keeps_the_rest() -> None:
    shifts = []
    for result in draws(ImageAugment(hue=0.1, **OFF), flat(200, 40, 40)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(result[0, 0] / 255))
        shifts.append((hue + 0.5) % 1 - 0.5)  # of red, whose hue is 0
        assert saturation == pytest.approx(0.8, abs=0.02)
        assert value == pytest.approx(200 / 255, abs=0.01)
    assert -0.105 <= min(shifts) < -0.09 and 0.09 < max(shifts) <= 0.105


def test_turning_a_change_on_leaves_the_others_as_they_were() -> None:
    image = noise(40, 60)
    for plain, mirror in zip(draws(ImageAugment(), image, 20), draws(ImageAugment(flip=1.0), image, 20), strict=True):
        assert np.array_equal(plain, mirror[:, ::-1])


def test_is_random_only_if_something_is_on() -> None:
    off = ImageAugment(**OFF)
    image = noise(9, 8)
    assert not off.is_random
    assert all(np.array_equal(result, np.asarray(image)) for result in draws(off, image, count=20))
    assert ImageAugment().is_random
    for option in ({"crop_scale": (0.5, 1.0)}, {"flip": 0.1}, {"brightness": 0.1}, {"contrast": 0.1}, {"saturation": 0.1}):
        assert ImageAugment(**OFF | option).is_random
    assert ImageAugment(hue=0.1, **OFF).is_random


@pytest.mark.parametrize(
    "option",
    [
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.9, 0.8)},
        {"crop_scale": (0.5, 1.1)},
        {"crop_scale": (float("nan"), 1.0)},
        {"crop_ratio": (0.0, 1.0)},
        {"crop_ratio": (1.1, 1.3)},
        {"crop_ratio": (0.5, 0.9)},
        {"crop_ratio": (0.5, float("inf"))},
        {"flip": 1.1},
        {"flip": -0.1},
        {"brightness": 1.5},
        {"contrast": -0.1},
        {"saturation": float("nan")},
        {"hue": 0.6},
    ],
)
def test_an_option_out_of_range_is_named(option: dict) -> None:
    with pytest.raises(ValueError, match=rf"augment\.{next(iter(option))} must .*, got"):
        ImageAugment(**option)
