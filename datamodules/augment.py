"""Random changes of training images, each a pure function of the seed, the epoch, the row and the place in it."""

import hashlib
import math
import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageEnhance
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """A random change of decoded media of one kind: a frozen dataclass, as its subclasses, whose fields are then options."""

    @property
    @abstractmethod
    def is_random(self) -> bool:
        """False where every change is off."""

    @property
    def draws_frames(self) -> bool:
        """Whether decoding draws the frames of a clip at random, too; here not."""
        return False

    @abstractmethod
    def __call__(self, decoded: Any, generator: random.Random, /) -> Any:
        """Changes a medium; what it was given stays as it is."""

    def change_tensor(self, tensor: Tensor, generator: random.Random, /) -> Tensor:
        """Changes what the encoder's transform made of a medium, where `__call__` is not enough; here it stays as it is."""
        return tensor


def rng(seed: int, epoch: int, row: int, occurrence: int, stage: int = 0) -> random.Random:
    """The random numbers of one medium: the same in every process, in every order and on every machine.

    Args:
        seed: Of the run.
        epoch: Counted from 0.
        row: Index of the row in its file.
        occurrence: Which medium of the row, counted from 0.
        stage: 0 for the decoded medium, 1 for what the transform makes of it.
    """
    text = f"{seed} {epoch} {row} {occurrence}" + (f" {stage}" if stage else "")
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class ImageAugment(Augment):
    """Random crop, flip and colour jitter of an RGB image, for training only.

    Args:
        crop_scale: Area of the crop as a share of the image, lowest and highest; (1, 1) turns it off.
        crop_ratio: Width / height of the crop, divided by that of the image, lowest and highest; it is drawn from the part
            of this range in which a crop of the drawn area fits.
        flip: Probability of a mirrored image. Off by default: questions and captions speak of left and right.
        brightness: The factor lies within 1 ± this; 0 turns it off.
        contrast: As for brightness.
        saturation: As for brightness.
        hue: The shift lies within ± this share of the colour circle, at most 0.5; 0 turns it off.
    """

    crop_scale: tuple[float, float] = (0.8, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.0
    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"augment.crop_scale must be two shares with 0 < low <= high <= 1, got {self.crop_scale}")
        low, high = self.crop_ratio
        if not 0 < low <= 1 <= high < math.inf:
            raise ValueError(f"augment.crop_ratio must be two ratios with 0 < low <= 1 <= high, got {self.crop_ratio}")
        for name, value, most in (
            ("flip", self.flip, 1),
            ("brightness", self.brightness, 1),
            ("contrast", self.contrast, 1),
            ("saturation", self.saturation, 1),
            ("hue", self.hue, 0.5),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"augment.{name} must lie in [0, {most}], got {value}")

    @property
    def is_random(self) -> bool:
        """False where every change is off, so that an image always stays as it is."""
        return self.crop_scale[0] < 1 or any((self.flip, self.brightness, self.contrast, self.saturation, self.hue))

    def __call__(self, image: Image.Image, generator: random.Random) -> Image.Image:
        """Changes the image; the result has the size of its crop.

        Args:
            image: RGB; it is left as it is.
            generator: From `rng`. The same number is drawn for each change, on or off, so that turning one on leaves
                the others as they were.
        """
        image = image.crop(self._crop_box(image.width, image.height, generator))
        if generator.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for enhance, strength in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            factor = generator.uniform(1 - strength, 1 + strength)
            if strength:
                image = enhance(image).enhance(factor)
        shift = round(256 * generator.uniform(-self.hue, self.hue))
        return _shift_hue(image, shift) if shift else image

    def _crop_box(self, width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, in whole pixels: nothing is resampled here.

        A crop of area s and relative ratio r is sqrt(s r) wide and sqrt(s / r) high, as shares of the image; it fits
        if s <= r <= 1 / s.
        """
        scale = generator.uniform(*self.crop_scale)
        low, high = max(self.crop_ratio[0], scale), min(self.crop_ratio[1], 1 / scale)
        ratio = math.exp(generator.uniform(math.log(low), math.log(high)))
        crop_width = min(width, max(1, round(width * math.sqrt(scale * ratio))))
        crop_height = min(height, max(1, round(height * math.sqrt(scale / ratio))))
        left = int(generator.random() * (width - crop_width + 1))
        top = int(generator.random() * (height - crop_height + 1))
        return left, top, left + crop_width, top + crop_height


def _shift_hue(image: Image.Image, shift: int) -> Image.Image:
    """Turns the hue by `shift` 256ths of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(step + shift) % 256 for step in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
