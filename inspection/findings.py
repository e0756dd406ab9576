"""What can be wrong with a row, in which words, and from which measure on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from datamodules.batch import Origin
from datamodules.source import Split
from inspection.measures import AudioMeasures, ImageMeasures, Measures, VideoMeasures
from inspection.neighbours import MOST_DISTANCE

Kind = Literal[
    "unreadable",
    "too_long",
    "blank",
    "dark",
    "bright",
    "blurred",
    "silent",
    "clipped",
    "black",
    "frozen",
    "mismatch",
    "identical_sides",
    "leak",
    "near_leak",
    "repeated_row",
    "duplicate",
    "near_duplicate",
]
"""Kinds of findings, in the order in which they are shown."""

KINDS: tuple[Kind, ...] = get_args(Kind)

REJECTED: tuple[Kind, ...] = KINDS[: KINDS.index("duplicate")]
"""By default a row that has one of these does not pass; copies of a medium alone are not the row's fault."""

TITLES: dict[Kind, str] = {
    "unreadable": "Rows that cannot be used",
    "too_long": "Rows that are too long",
    "blank": "Images of one colour",
    "dark": "Images that are nearly black",
    "bright": "Images that are nearly white",
    "blurred": "Blurred images",
    "silent": "Silent sounds",
    "clipped": "Clipped sounds",
    "black": "Black videos",
    "frozen": "Frozen videos",
    "mismatch": "Media that do not fit their text",
    "identical_sides": "Preference rows whose sides are the same",
    "leak": "Training rows that are in validation or test",
    "near_leak": "Training rows with nearly a medium of validation or test",
    "repeated_row": "Rows that stand in the data before",
    "duplicate": "Copies of a medium",
    "near_duplicate": "Nearly copies of a medium",
}


@dataclass(frozen=True)
class Thresholds:
    """From where on a medium is found wanting.

    Args:
        blur: An image is blurred below this variance of the Laplacian, measured on at most 512 pixels a side.
        blank: An image is of one colour below this standard deviation of its brightness, of 255.
        dark: An image is nearly black where 99 % of its pixels are at most this bright, of 255.
        bright: An image is nearly white where 99 % of its pixels are at least this bright.
        silence_db: A sound is silent below this level, in dB of full scale.
        clipped: A sound is clipped where more than this share of its samples lies in flat tops at full scale.
        black: A video is black where at least this share of its frames is.
        frozen: A video is frozen where at least this share of its frames equals the one before.
        near_bits: Two media are nearly the same where their perceptual hashes differ in at most this many of 64 bits ...
        near_colours: ... and the cells of their sketches by at most this many levels of 255, on average.
    """

    blur: float = 100.0
    blank: float = 2.0
    dark: float = 20.0
    bright: float = 250.0
    silence_db: float = -60.0
    clipped: float = 0.001
    black: float = 0.9
    frozen: float = 0.95
    near_bits: int = 6
    near_colours: float = 10.0

    def __post_init__(self) -> None:
        for name in ("clipped", "black", "frozen"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"thresholds.{name} is a share, in [0, 1], got {vars(self)[name]}")
        if not 0 <= self.near_bits <= MOST_DISTANCE:
            raise ValueError(f"thresholds.near_bits is a number of bits from 0 to {MOST_DISTANCE}, got {self.near_bits}")
        if not all(math.isfinite(value) for value in vars(self).values()):
            raise ValueError(f"thresholds are finite numbers, got {self}")


@dataclass(frozen=True, slots=True)
class Place:
    """A row, and maybe one of its media.

    Args:
        part: The number of the file's part in the survey.
        row: The number of the row in it.
        medium: The number of the medium in the row; None: the row as a whole.
    """

    part: int
    row: int
    medium: int | None = None


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a row.

    Args:
        kind: What.
        place: Where.
        reason: In words, with the figures.
        split: The split of the row.
        origin: Its file and line.
        medium: The medium that it is about, as the row names it; empty: the row as a whole.
        other: Where it was seen before, or is seen again.
    """

    kind: Kind
    place: Place
    reason: str
    split: Split
    origin: Origin
    medium: str = ""
    other: Place | None = None


def judge(measures: Measures, thresholds: Thresholds) -> Iterator[tuple[Kind, str]]:
    """What is wrong with a medium by itself, and why."""
    match measures:
        case ImageMeasures():
            yield from _judge_image(measures, thresholds)
        case VideoMeasures():
            yield from _judge_video(measures, thresholds)
        case AudioMeasures():
            yield from _judge_audio(measures, thresholds)


def _judge_image(image: ImageMeasures, thresholds: Thresholds) -> Iterator[tuple[Kind, str]]:
    if image.contrast < thresholds.blank:
        yield "blank", f"brightness has a standard deviation of {image.contrast:.2f}, below blank = {thresholds.blank:g}"
    elif image.dark <= thresholds.dark:
        yield "dark", f"99 % of the pixels are at most {image.dark:.0f} of 255 bright, dark is {thresholds.dark:g}"
    elif image.bright >= thresholds.bright:
        yield "bright", f"99 % of the pixels are at least {image.bright:.0f} of 255 bright, bright is {thresholds.bright:g}"
    elif image.sharpness < thresholds.blur:
        yield "blurred", f"the variance of the Laplacian is {image.sharpness:.1f}, below blur = {thresholds.blur:g}"


def _judge_video(video: VideoMeasures, thresholds: Thresholds) -> Iterator[tuple[Kind, str]]:
    if video.black_share >= thresholds.black:
        yield "black", f"{100 * video.black_share:.0f} % of the sampled frames are black, black is {100 * thresholds.black:g} %"
    elif video.frozen_share >= thresholds.frozen:
        share, least = 100 * video.frozen_share, 100 * thresholds.frozen
        yield "frozen", f"{share:.0f} % of the sampled frames equal the one before, frozen is {least:g} %"


def _judge_audio(sound: AudioMeasures, thresholds: Thresholds) -> Iterator[tuple[Kind, str]]:
    if sound.level_db < thresholds.silence_db:
        yield "silent", f"the level is {sound.level_db:.0f} dB of full scale, below silence_db = {thresholds.silence_db:g}"
    if sound.clipped_share > thresholds.clipped:
        share, most = 100 * sound.clipped_share, 100 * thresholds.clipped
        yield "clipped", f"{share:.2f} % of the samples lie in flat tops at full scale, above clipped = {most:g} %"
