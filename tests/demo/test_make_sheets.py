import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from demo.make_sheets import make_sheets, read_idx
from demo.pictures import CLASSES, COLUMNS, TILES, cut


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


def test_read_idx_gives_what_was_written_and_refuses_other_files(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    write_idx(tmp_path / "a.gz", array)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01\0\0\0\0"))
    with pytest.raises(ValueError, match="no IDX file of unsigned bytes"):
        read_idx(tmp_path / "b.gz")


def test_every_tile_is_a_different_picture_of_its_class(tmp_path):
    random = np.random.default_rng(0)
    expected = {}
    for prefix, splits in (("train", ("train", "preference")), ("t10k", ("test",))):
        num_tiles = sum(TILES[split] for split in splits)
        labels = random.permutation(np.repeat(np.arange(10, dtype=np.uint8), num_tiles + 20))
        images = random.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
        expected[splits] = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    make_sheets(tmp_path, tmp_path / "sheets")
    for splits, label_of in expected.items():
        for label, name in enumerate(CLASSES):
            sheets = {split: tmp_path / "sheets" / f"{split}_{name}.png" for split in splits}
            tiles = [tile for split, sheet in sheets.items() for tile in cut(sheet, COLUMNS[split], TILES[split])]
            assert len({tile.tobytes() for tile in tiles}) == sum(TILES[split] for split in splits), "no picture is in two splits"
            assert {label_of[tile.tobytes()] for tile in tiles} == {label}
