"""Overlapping tiles for images whose features do not fit in memory.

DFPIR's attention spans the whole image, so a tile is restored with the statistics of its own pixels: the result
differs from that of the whole image, and tiles are for what cannot be done whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SMALLEST_TILE_PX = 64


@dataclass(frozen=True)
class Span:
    """A stretch of one axis: `start` and `length` in pixels, and its blending `weights` (length, float32).

    At every pixel the weights of all spans of an axis sum to 1.
    """

    start: int
    length: int
    weights: Tensor

    @property
    def slice(self) -> slice:
        """The stretch as an index."""
        return slice(self.start, self.start + self.length)


def overlap_for(tile_px: int, multiple: int) -> int:
    """Overlap of neighbouring tiles in pixels: an eighth of the tile, at most about 64, a multiple of `multiple`."""
    return max(multiple, min(tile_px // 8, 64) // multiple * multiple)


def spans(length: int, *, tile_px: int, overlap_px: int, multiple: int) -> list[Span]:
    """As few equal stretches as cover an axis, as short as may be, neighbours overlapping by at least `overlap_px`.

    Args:
        length: of the axis in pixels, a multiple of `multiple`.
        tile_px: the most of each stretch, a multiple of `multiple` above `overlap_px`; a shorter axis is one stretch.
        overlap_px: least overlap, a multiple of `multiple`.
        multiple: starts are multiples of it.
    """
    if length <= tile_px:
        return [Span(0, length, torch.ones(length, device="cpu"))]
    count = -(-(length - overlap_px) // (tile_px - overlap_px))
    tile_px = -(-(length + (count - 1) * overlap_px) // (count * multiple)) * multiple
    last = (length - tile_px) // multiple
    starts = [i * last // (count - 1) * multiple for i in range(count)]
    # Rising and falling straight lines that never reach 0, so that the sum can always be divided by.
    ramp = torch.arange(1, tile_px + 1, dtype=torch.float64, device="cpu")
    hat = torch.minimum(ramp, ramp.flip(0)).clamp(max=overlap_px)
    total = torch.zeros(length, dtype=torch.float64, device="cpu")
    for start in starts:
        total[start : start + tile_px] += hat
    return [Span(start, tile_px, (hat / total[start : start + tile_px]).float()) for start in starts]


def run_tiled(
    image: Tensor, restore: Callable[[Tensor], Tensor], *, tile_px: int, multiple: int, batch_limit: int
) -> Tensor:
    """Restores an image tile by tile and blends the overlaps.

    Args:
        image: C x H x W, sides multiples of `multiple`.
        restore: B x C x h x w to the same shape; gets equal tiles only.
        tile_px: most of a tile's side, a multiple of `multiple` and at least two of them.
        multiple: tiles start at multiples of it.
        batch_limit: most tiles in one call of `restore`.

    Returns:
        C x H x W of the image's dtype and device.
    """
    overlap_px = overlap_for(tile_px, multiple)
    rows, columns = (
        spans(length, tile_px=tile_px, overlap_px=overlap_px, multiple=multiple) for length in image.shape[1:]
    )
    tiles = list(product(rows, columns))
    out = torch.zeros_like(image)
    for first in range(0, len(tiles), batch_limit):
        chunk = tiles[first : first + batch_limit]
        restored = restore(torch.stack([image[:, row.slice, column.slice] for row, column in chunk]))
        for (row, column), tile in zip(chunk, restored, strict=True):
            weights = (row.weights[:, None] * column.weights).to(tile.device)
            out[:, row.slice, column.slice] += tile * weights
    return out
