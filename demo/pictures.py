"""The pictures of the demo: sheets of Fashion-MNIST, cut into single files with a question and an answer each."""

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from demo.once import make_once
from demo.rows import SPLITS, make_row, prepared, write_rows

SHEETS = Path(__file__).parent / "fashion"
TILE = 28
"""Pixels, each side of a picture."""
TILES = {"train": 300, "preference": 200, "test": 50}
"""Pictures of each class in a sheet."""
COLUMNS = {"train": 20, "preference": 20, "test": 10}
VAL_TILES = 10
"""The last pictures of each training sheet serve for validation."""

CLASSES = {
    "t-shirt": "T-shirt",
    "trouser": "Trouser",
    "pullover": "Pullover",
    "dress": "Dress",
    "coat": "Coat",
    "sandal": "Sandal",
    "shirt": "Shirt",
    "sneaker": "Sneaker",
    "bag": "Bag",
    "ankle-boot": "Ankle boot",
}
"""The answer of each class, in the order of the labels of Fashion-MNIST."""
QUESTION = "What is this?"
VERSION = 2
"""Raise it when `prepare` comes to write something else."""


def prepare(folder: Path) -> dict[str, Path]:
    """Writes the demo's pictures and rows; does nothing if they are there.

    Training has 290 pictures a class, validation 10, both from the training split of Fashion-MNIST; the held-out
    test has 50 a class from its test split. 200 more a class from the training split are for preferences alone.

    Args:
        folder: Where to; it may exist only if this function made it.

    Returns:
        The files `train`, `val`, `test` and `preference` (JSONL, rows shuffled by a fixed seed), and their `media_root`.

    Raises:
        ValueError: The folder holds something else, or a sheet is missing or of the wrong size.
    """
    made_from = {"version": VERSION, "question": QUESTION, "answers": list(CLASSES.values())}
    make_once(folder, made_from, partial(_write, SHEETS))
    return prepared(folder, "image") | {"preference": folder / "preference.jsonl"}


def cut(sheet: Path, columns: int, count: int) -> list[Image.Image]:
    """The tiles of a sheet, row by row.

    Args:
        sheet: A picture of `columns` by `count / columns` tiles without gaps.
        columns: Tiles in a row.
        count: Tiles in the sheet.

    Raises:
        ValueError: The sheet is missing or of another size.
    """
    if not sheet.is_file():
        raise ValueError(f"{sheet} is missing: it belongs to the repository; restore it with `git checkout -- {sheet}`")
    with Image.open(sheet) as picture:
        expected = (columns * TILE, count // columns * TILE)
        if picture.size != expected:
            raise ValueError(f"{sheet} has {picture.size} pixels, expected {expected}: restore it with `git checkout -- {sheet}`")
        corners = [(column * TILE, row * TILE) for row in range(count // columns) for column in range(columns)]
        return [picture.crop((x, y, x + TILE, y + TILE)) for x, y in corners]


def _write(sheets: Path, folder: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in (*SPLITS, "preference")}
    for split, count in TILES.items():
        for name, answer in CLASSES.items():
            (folder / "images" / split / name).mkdir(parents=True)
            tiles = cut(sheets / f"{split}_{name}.png", COLUMNS[split], count)
            for number, tile in enumerate(tiles, start=1):
                image = f"{split}/{name}/{number:04}.png"
                tile.save(folder / "images" / image)
                held_out = split == "train" and number > count - VAL_TILES
                row = make_row("image", image, QUESTION, answer, list(CLASSES.values()))
                rows["val" if held_out else split].append(row)
    write_rows(rows, folder)
