"""Padding to a multiple by mirroring, for images of any size from 1 x 1 up."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The smallest size, in pixels, that holds the image and has both sides multiples of `multiple`."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def _mirrored(length: int, target: int) -> NDArray[np.intp]:
    """What positions `length` to `target` show: positions 0..length-1 there and back, edge included, over and over."""
    position = np.arange(length, target) % (2 * length)
    return np.minimum(position, 2 * length - 1 - position)


def pad_into(room: NDArray[Any], image: NDArray[Any]) -> None:
    """Fills H x W x C with a smaller image, mirrored below and to the right, edge included.

    The image lies in the first rows and columns, and repeats as often as needed: a single pixel can fill any size.
    """
    height, width = image.shape[:2]
    room[:height, :width] = image
    room[:height, width:] = room[:height, _mirrored(width, room.shape[1])]
    room[height:] = room[_mirrored(height, room.shape[0])]
