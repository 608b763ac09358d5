"""EXIF made that of the upright picture, in place.

Nothing moves, since makers' notes may hold offsets of their own, and no value is read and written again, whereby
Pillow loses types and letters beyond ASCII.
"""

import struct
from typing import Literal

from PIL import ExifTags

_PREFIX = b"Exif\0\0"
_SHORT = 3

_ACROSS_AND_DOWN = (
    (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength),
    (ExifTags.Base.XResolution, ExifTags.Base.YResolution),
    (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight),
    (ExifTags.Base.FocalPlaneXResolution, ExifTags.Base.FocalPlaneYResolution),
)
"""Tags of the two directions of a picture."""


def upright_exif(exif: bytes, *, is_turned: bool, lies: bool) -> bytes:
    """EXIF, with or without its marker, as of the upright picture: with marker, without a thumbnail.

    The thumbnail would show the photograph unrestored. Of a picture that is neither turned nor has one the EXIF
    stays as it is, byte by byte.

    Args:
        exif: as the file holds it.
        is_turned: whether the orientation that it states has been made 1.
        lies: whether the file's rows are the upright picture's columns.
    """
    tiff = bytearray(exif.removeprefix(_PREFIX))
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    first = int.from_bytes(tiff[4:8], order)
    entries = _entries(tiff, first, order)
    following = first + 2 + 12 * int.from_bytes(tiff[first : first + 2], order)
    if following + 4 <= len(tiff):
        tiff[following : following + 4] = bytes(4)
    if is_turned and (entry := entries.get(ExifTags.Base.Orientation)) is not None:
        tiff[entry + 2 : entry + 12] = struct.pack("<HIHH" if order == "little" else ">HIHH", _SHORT, 1, 1, 0)
    if lies:
        pointer = entries.get(ExifTags.IFD.Exif)
        details = int.from_bytes(tiff[pointer + 8 : pointer + 12], order) if pointer is not None else len(tiff)
        for directory in (entries, _entries(tiff, details, order)):
            _swap_directions(tiff, directory)
    return _PREFIX + bytes(tiff)


def _entries(tiff: bytearray, start: int, order: Literal["little", "big"]) -> dict[int, int]:
    """Where the entries of a directory stand, by tag; of one that is cut short those that are there."""
    count = int.from_bytes(tiff[start : start + 2], order)
    places = range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12)
    return {int.from_bytes(tiff[place : place + 2], order): place for place in places}


def _swap_directions(tiff: bytearray, directory: dict[int, int]) -> None:
    """Swaps types, counts and values (or where they stand) of the tags that come in pairs."""
    for pair in _ACROSS_AND_DOWN:
        across, down = map(directory.get, pair)
        if across is not None and down is not None:
            one, other = slice(across + 2, across + 12), slice(down + 2, down + 12)
            tiff[one], tiff[other] = tiff[other], tiff[one]
