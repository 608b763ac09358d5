"""JPEG by libjpeg-turbo itself, which tells of damage that Pillow's reader of it passes over."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_NOT_OF_THE_FILE = ("subsampling", "Unsupported")
"""In what the library says of kinds that it does not read, and Pillow does."""

_SCAN, _ADOBE, _COMMENT = 0xDA, 0xEE, 0xFE
_WITHOUT_CONTENT = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
"""What may follow 0xFF without a segment."""


def read_jpeg(data: bytes, *, in_inks: bool) -> tuple[NDArray[np.uint8] | None, str]:
    """The pixels of a JPEG in colour or greyscale, H x W x 3 RGB as stored, the same as Pillow's to the bit.

    None, and what libjpeg says of the pixels, where it meets anything that is not as it should be; it says one thing,
    and so is asked again without what stands before them. Kinds that it does not read give None and nothing; one
    `in_inks` (CMYK) gives None, since it is Pillow that knows whether they are inverted.
    Raises MemoryError.
    """
    colorspace = "CMYK" if in_inks else "RGB"
    pixels, said = _read(data, colorspace)
    if pixels is None and said and "premature" not in said.lower():
        of_bare = _read(_bare(data), colorspace)[1]
        said = of_bare or ("" if "ICC" in said else said)
    return None if in_inks else pixels, said


def _read(data: bytes, colorspace: str) -> tuple[NDArray[np.uint8] | None, str]:
    try:
        return simplejpeg.decode_jpeg(data, colorspace=colorspace, strict=True), ""
    except ValueError as error:
        said = str(error)
    if "memory" in said.lower():
        raise MemoryError(said)
    return None, "" if any(each in said for each in _NOT_OF_THE_FILE) else said


def _bare(data: bytes) -> bytes:
    """A JPEG with only those segments that its pixels need, and nothing between them; as it is if it has no scan."""
    kept, at = [data[:2]], data.find(b"\xff", 2)
    while 0 <= at < len(data) - 4:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SCAN:
            return b"".join([*kept, data[at:]])
        if marker == 0xFF or marker in _WITHOUT_CONTENT:
            end = at + 1
        elif marker == _ADOBE or not (0xE0 <= marker <= 0xEF or marker == _COMMENT):
            kept.append(data[at:end])
        at = data.find(b"\xff", end)
    return data
