"""Before/after pictures for people."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
GAP_PX = 4
CAPTION_PX = 18


def side_by_side(rows: Sequence[Sequence[tuple[str, Pixels]]], *, cell_px: int) -> Image.Image:
    """A sheet of captioned pictures.

    Args:
        rows: rows of (caption, H x W x 3 uint8 picture).
        cell_px: longest side of a picture on the sheet; larger ones are shrunk.
    """
    font = ImageFont.load_default(size=13)
    cells = [[(caption, _fit(pixels, cell_px)) for caption, pixels in row] for row in rows]
    needed = [[max(picture.width, ceil(font.getlength(caption))) for caption, picture in row] for row in cells]
    widths = [max(row[i] for row in needed if i < len(row)) for i in range(max(map(len, cells)))]
    heights = [max(picture.height for _, picture in row) + CAPTION_PX for row in cells]
    sheet = Image.new(
        "RGB", (sum(widths) + GAP_PX * (len(widths) + 1), sum(heights) + GAP_PX * (len(heights) + 1)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    top = GAP_PX
    for row, height in zip(cells, heights, strict=True):
        left = GAP_PX
        for (caption, picture), width in zip(row, widths, strict=False):
            draw.text((left, top), caption, fill="black", font=font)
            sheet.paste(picture, (left, top + CAPTION_PX))
            left += width + GAP_PX
        top += height + GAP_PX
    return sheet


def _fit(pixels: Pixels, cell_px: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    picture.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
    return picture
