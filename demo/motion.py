"""The videos of the demo: an emoji that moves left, right, up or down, drawn and encoded once from a sheet of pictures.

Shape suffixes: F frames, H height, W width.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.once import make_once
from demo.rows import SEED, make_row, prepared, write_rows

SHEET = Path(__file__).parent / "emoji" / "sheet.png"
TILE = 48
"""Pixels, each side of an emoji in the sheet."""
COLUMNS = 12
EMOJI = (
    "🐶🐱🐭🐹🐰🦊🐻🐼🐨🐯🦁🐮"
    "🐷🐸🐵🐔🐧🐦🦆🦉🐴🦄🐝🐛"
    "🦋🐌🐞🐢🐙🦀🐠🐬🐳🐘🦒🐑"
    "🌵🌲🌻🍄🍎🍐🍊🍋🍌🍉🍇🍓"
    "🍒🍍🥝🍅🥕🌽🍞🧀🍕🍔🍩🍪"
    "🎂🍭☕🚗🚌🚒🚜🚲🚂🚀🚁⛵"
    "🏠⏰☂⚽🏀🎈🎁🎸🎺🥁📷📚"
    "🔑🔔💡🧲🧸👑🎩👟🧦🎃⭐🌍"
)
"""What the tiles of the sheet show, row by row."""
SPLIT_EMOJI = {"train": 70, "val": 8, "test": 18}
"""Emoji in each split; none is in two of them."""
CLIPS_EACH = 3
"""Clips of each emoji in each direction."""

STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""The answers, and what they mean for x and y."""
QUESTION = "Which way?"

SIZE = 96
"""Pixels, each side of a frame."""
FRAMES = 12
FRAMES_PER_SECOND = 12
EMOJI_PIXELS = (28, 40)
"""Range of the edge of the moving emoji."""
TRAVEL_PIXELS = (30, 48)
"""Range of the way from the first frame to the last."""
GREY_LEVELS = (40, 216)
"""Range of each colour channel of the background."""
NOISE = 6.0
"""Standard deviation of the background's grain, which stands still, in grey levels."""
VERSION = 1
"""Raise it when `prepare` comes to write something else."""


def prepare(folder: Path) -> dict[str, Path]:
    """Draws and encodes the demo's videos, and writes their rows; does nothing if they are there.

    Training has 840 clips of 70 emoji, validation 96 of 8 others, the held-out test 216 of the other 18: each emoji goes in
    each direction three times, so what moves says nothing about where to.

    Args:
        folder: Where to; it may exist only if this function made it.

    Returns:
        The files `train`, `val` and `test` (JSONL, rows shuffled by a fixed seed), and their `media_root`.

    Raises:
        ValueError: The folder holds something else, or the sheet is missing or of the wrong size.
    """
    tiles = read_sheet(SHEET)
    pixels = hashlib.sha256(b"".join(tile.tobytes() for tile in tiles)).hexdigest()
    made_from = {"version": VERSION, "seed": SEED, "question": QUESTION, "splits": SPLIT_EMOJI, "emoji_sha256": pixels}
    make_once(folder, made_from, partial(_write, tiles))
    return prepared(folder, "video")


def read_sheet(sheet: Path) -> list[Image.Image]:
    """The emoji of the sheet in the order of `EMOJI`, with transparency.

    Raises:
        ValueError: The sheet is missing or of another size.
    """
    if not sheet.is_file():
        raise ValueError(f"{sheet} is missing: it belongs to the repository; restore it with `git checkout -- {sheet}`")
    with Image.open(sheet) as picture:
        expected = (COLUMNS * TILE, len(EMOJI) // COLUMNS * TILE)
        if picture.size != expected:
            raise ValueError(f"{sheet} has {picture.size} pixels, expected {expected}: restore it with `git checkout -- {sheet}`")
        corners = [(number % COLUMNS * TILE, number // COLUMNS * TILE) for number in range(len(EMOJI))]
        return [picture.convert("RGBA").crop((x, y, x + TILE, y + TILE)) for x, y in corners]


def draw_clip(emoji: Image.Image, direction: str, random: np.random.Generator) -> NDArray[np.uint8]:
    """A clip of an emoji that moves at constant speed and stays within the frame.

    Its size, place, speed and background are drawn at random. Where it is in one frame alone tells the direction in about half
    of the clips only, for what moves left is more often on the right at first.

    Args:
        emoji: A picture with transparency.
        direction: One of `STEPS`.
        random: Draws.

    Returns:
        frames_FHW3, RGB.
    """
    edge = int(random.integers(*EMOJI_PIXELS, endpoint=True))
    free = SIZE - edge
    travel = random.uniform(TRAVEL_PIXELS[0], min(TRAVEL_PIXELS[1], free))
    start, across = random.uniform(0, free - travel), random.uniform(0, free)
    colour_3 = random.integers(*GREY_LEVELS, size=3)
    background_HW3 = (colour_3 + random.normal(0, NOISE, (SIZE, SIZE, 1))).clip(0, 255).astype(np.uint8)

    emoji = emoji.resize((edge, edge), Image.Resampling.BICUBIC)
    step_x, step_y = STEPS[direction]
    frames = []
    for moved in np.linspace(0, travel, FRAMES):
        along = start + (moved if step_x + step_y > 0 else travel - moved)
        frame = Image.fromarray(background_HW3)
        frame.paste(emoji, (round(along), round(across)) if step_x else (round(across), round(along)), emoji)
        frames.append(np.asarray(frame))
    return np.stack(frames)


def write_video(frames_FHW3: NDArray[np.uint8], path: Path) -> None:
    """Encodes frames as H.264."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"preset": "veryfast", "crf": "20"})
        stream.height, stream.width = frames_FHW3.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # starting threads would cost more than so small a picture
        for frame_HW3 in frames_FHW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HW3)))
        container.mux(stream.encode())


def _write(tiles: list[Image.Image], folder: Path) -> None:
    order = iter(np.random.default_rng(SEED).permutation(len(EMOJI)).tolist())
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, count in SPLIT_EMOJI.items():
        (folder / "videos" / split).mkdir(parents=True)
        rows[split] = []
        for number in (next(order) for _ in range(count)):
            for take, direction in ((take, direction) for take in range(CLIPS_EACH) for direction in STEPS):
                video = f"{split}/{number:02}-{direction}-{take + 1}.mp4"
                random = np.random.default_rng((SEED, number, take, list(STEPS).index(direction)))
                write_video(draw_clip(tiles[number], direction, random), folder / "videos" / video)
                rows[split].append(make_row("video", video, QUESTION, direction, list(STEPS)))
    write_rows(rows, folder)
