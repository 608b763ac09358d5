"""JPEG by libjpeg-turbo itself, which tells of damage that Pillow's reader of it passes over."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray


def read_jpeg(data: bytes) -> tuple[NDArray[np.uint8] | None, str]:
    """The pixels of a JPEG in colour or greyscale, H x W x 3 RGB as stored, the same as Pillow's to the bit.

    None, and what libjpeg says, where it meets anything that is not as it should be. A profile is not read here.
    """
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True), ""
    except ValueError as error:
        return None, "" if "ICC" in str(error) else str(error)
