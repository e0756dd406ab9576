import numpy as np
from PIL import ImageFont

from demo.make_emoji import FONT_SIZE, make_sheet
from demo.motion import COLUMNS, EMOJI, TILE, read_sheet


def test_each_emoji_fills_a_tile_of_its_own(tmp_path):
    make_sheet(ImageFont.load_default(FONT_SIZE)).save(tmp_path / "sheet.png")  # a font without emoji draws boxes
    tiles = read_sheet(tmp_path / "sheet.png")
    assert len(tiles) == len(EMOJI) == COLUMNS * 8
    for tile in tiles:
        rows, columns = np.nonzero(np.asarray(tile)[:, :, 3] > 8)
        assert max(np.ptp(rows), np.ptp(columns)) >= TILE - 3
        assert abs(rows.min() + rows.max() - TILE) <= 3, "it is not in the middle"
        assert abs(columns.min() + columns.max() - TILE) <= 3
