"""How demo/fashion/ was made: a balanced subset of Fashion-MNIST as one sheet of pictures a class.

    python -m demo.make_sheets IDX_FOLDER

IDX_FOLDER holds the four files `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz`, `t10k-images-idx3-ubyte.gz` and
`t10k-labels-idx1-ubyte.gz` as https://github.com/zalandoresearch/fashion-mnist publishes them. The demo does not need them.
"""

import argparse
import gzip
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.pictures import CLASSES, COLUMNS, SHEETS, TILE, TILES

SEED = 2017
IDX_PREFIX = {"train": "train", "preference": "train", "test": "t10k"}
FIRST = {"train": 0, "preference": TILES["train"], "test": 0}
"""The first of the shuffled pictures of a class that a split takes."""


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Reads bytes in the IDX form of MNIST (http://yann.lecun.com/exdb/mnist/).

    Raises:
        ValueError: The file is no IDX file of bytes.
    """
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path} is no IDX file of unsigned bytes: it starts with {data[:4].hex()}, expected 000008 and the rank"
        )
    rank = data[3]
    shape = np.frombuffer(data, ">i4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def make_sheets(idx_folder: Path, folder: Path) -> None:
    """Draws `TILES` pictures of each class and split by a seeded shuffle, and writes them as sheets.

    Args:
        idx_folder: The four published files.
        folder: Gets `train_<class>.png`, `preference_<class>.png` and `test_<class>.png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in IDX_PREFIX.items():
        images_NHW = read_idx(idx_folder / f"{prefix}-images-idx3-ubyte.gz")
        labels_N = read_idx(idx_folder / f"{prefix}-labels-idx1-ubyte.gz")
        for label, name in enumerate(CLASSES):
            indices = np.flatnonzero(labels_N == label).tolist()
            random.Random(SEED).shuffle(indices)
            tiles_NHW = images_NHW[indices[FIRST[split] : FIRST[split] + TILES[split]]]
            grid = tiles_NHW.reshape(-1, COLUMNS[split], TILE, TILE).swapaxes(1, 2)
            sheet_HW = grid.reshape(-1, COLUMNS[split] * TILE)
            Image.fromarray(sheet_HW).save(folder / f"{split}_{name}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("idx_folder", type=Path)
    make_sheets(parser.parse_args().idx_folder, SHEETS)
