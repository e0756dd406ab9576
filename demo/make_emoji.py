"""How demo/emoji/sheet.png was made: pictures of the Noto Color Emoji font, one sheet.

    python -m demo.make_emoji NotoColorEmoji.ttf

The font is the one with pictures (CBDT), as https://github.com/googlefonts/noto-emoji publishes it. The demo does not need it.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from demo.motion import COLUMNS, EMOJI, SHEET, TILE

FONT_SIZE = 109
"""The only size of the font's pictures."""
CANVAS = 160
"""Pixels, each side; room for any of them."""


def make_sheet(font: ImageFont.FreeTypeFont) -> Image.Image:
    """Each emoji, cut to its visible part, as big as its tile, on transparent ground.

    Args:
        font: Draws an emoji.
    """
    sheet = Image.new("RGBA", (COLUMNS * TILE, len(EMOJI) // COLUMNS * TILE))
    for number, emoji in enumerate(EMOJI):
        canvas = Image.new("RGBA", (CANVAS, CANVAS))
        ImageDraw.Draw(canvas).text((0, 0), emoji, font=font, embedded_color=True)
        picture = canvas.crop(canvas.getbbox())
        edge = max(picture.size)
        square = Image.new("RGBA", (edge, edge))
        square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
        tile = square.resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, (number % COLUMNS * TILE, number // COLUMNS * TILE))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("font", type=Path)
    font = ImageFont.truetype(parser.parse_args().font, FONT_SIZE)
    SHEET.parent.mkdir(exist_ok=True)
    make_sheet(font).save(SHEET, optimize=True)
