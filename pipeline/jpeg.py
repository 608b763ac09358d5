"""JPEG by libjpeg-turbo itself, which tells of damage that Pillow's reader of it passes over."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_TURNED = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
"""What turns pixels of each EXIF orientation upright; 1 already are."""


def read_jpeg(data: bytes) -> tuple[NDArray[np.uint8] | None, str]:
    """The pixels of a JPEG in colour or greyscale, H x W x 3 RGB as stored, the same as Pillow's to the bit.

    None, and what libjpeg says, where it meets anything that is not as it should be. A profile is not read here.
    """
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True), ""
    except ValueError as error:
        return None, "" if "ICC" in str(error) else str(error)


def turned_upright(pixels: NDArray[np.uint8], orientation: int | None) -> NDArray[np.uint8]:
    """Pixels in their order in memory, as the EXIF orientation wants them seen."""
    turn = _TURNED.get(orientation or 1)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))
