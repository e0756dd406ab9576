"""Small pictures of media."""

import numpy as np
import pytest
from PIL import Image

from datamodules.media_audio import Waveform
from datamodules.media_video import Clip
from datamodules.thumbnails import THUMBNAIL_PIXELS, side_by_side, thumbnail

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def test_an_image_is_shown_small_and_stays_as_it_is() -> None:
    image = Image.new("RGB", (400, 200), RED)
    assert thumbnail(image).size == (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS // 2) and image.size == (400, 200)
    small = Image.new("RGB", (9, 7), BLUE)
    assert thumbnail(small).size == (9, 7)


@pytest.mark.parametrize(("num_frames", "shown"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_a_clip_is_its_first_middle_and_last_frame(num_frames: int, shown: int) -> None:
    frames_FHW3 = np.zeros((num_frames, 8, 10, 3), np.uint8)
    frames_FHW3[:, :, :, 1] = np.arange(num_frames)[:, None, None]
    picture = thumbnail(Clip(frames_FHW3, np.arange(float(num_frames))))
    assert picture.size == (10 * shown, 8)
    greens = [picture.getpixel((10 * place + 5, 4)) for place in range(shown)]
    assert greens == [(0, frame, 0) for frame in sorted({0, num_frames // 2, num_frames - 1})]


def test_a_sound_is_as_high_as_it_is_loud() -> None:
    quiet_then_loud_S = np.concatenate([np.full(8800, 0.1), np.full(8800, -1.0)]).astype(np.float32)
    pixels = np.asarray(thumbnail(Waveform(quiet_then_loud_S, 16_000)).convert("L"))
    heights = (pixels < 200).sum(axis=0)
    assert pixels.shape == (THUMBNAIL_PIXELS // 2, THUMBNAIL_PIXELS)
    assert set(heights[: THUMBNAIL_PIXELS // 2]) == {2 * 4 + 1} and set(heights[THUMBNAIL_PIXELS // 2 :]) == {2 * 43 + 1}
    assert thumbnail(Waveform(np.zeros(3, np.float32), 16_000)).size == (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS // 2)


def test_pictures_side_by_side() -> None:
    sheet = side_by_side([Image.new("RGB", (2, 3), RED), Image.new("RGB", (4, 1), BLUE)])
    assert sheet.size == (6, 3)
    assert [sheet.getpixel(at) for at in ((1, 2), (5, 0), (5, 2))] == [RED, BLUE, WHITE]
