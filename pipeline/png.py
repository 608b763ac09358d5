"""PNG's pixels filtered with NumPy and deflated by ISA-L, several times as fast as by Pillow, which writes the rest."""

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image

from pipeline.file_bytes import BEGINNINGS, png_chunks
from pipeline.image_records import Pixels

_LEVEL = 2
"""Of ISA-L's 0 to 3; 3 is slower and, on photographs, larger."""

_BAND_BYTES = 2**18
"""Rows are filtered so many bytes at a time, which stay in the cache of a core."""

Rows = NDArray[np.uint8]


def encode_png(channels: Pixels, options: Mapping[str, object]) -> bytes:
    """A PNG file of pixels that Pillow has a mode for.

    Each row has whichever of the filters Sub, Up and Average leaves the smallest sum of absolute values (PNG
    specification, third edition, 12.7). Not the file's bytes but its pixels are the same on every processor.

    Args:
        channels: H x W or H x W x 2 to 4 uint8, or H x W uint16.
        options: Pillow's keyword arguments for what stands beside the pixels.
    """
    one_pixel = io.BytesIO()
    Image.fromarray(channels[:1, :1]).save(one_pixel, "PNG", **cast(dict[str, object], options))
    around = one_pixel.getvalue()
    parts = [BEGINNINGS["PNG"][0]]
    for kind, begin, end in png_chunks(around):
        match kind:
            case b"IHDR":
                height, width = channels.shape[:2]
                parts += _chunk(kind, struct.pack(">II", width, height) + around[begin + 8 : end])
            case b"IDAT":
                for compressed in _compressed(channels):
                    parts += _chunk(kind, compressed)
            case _:
                parts.append(around[begin - 8 : end + 4])
    return b"".join(parts)


def _chunk(kind: bytes, content: bytes) -> list[bytes]:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return [struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)]


def _compressed(channels: Pixels) -> Iterator[bytes]:
    """The stream of all rows, in pieces."""
    height = len(channels)
    stored = channels.astype(">u2") if channels.dtype == np.uint16 else channels
    rows = np.ascontiguousarray(stored).view(np.uint8).reshape(height, -1)
    pixel_bytes = rows.shape[1] // channels.shape[1]
    deflate = isal_zlib.compressobj(_LEVEL)
    step = max(1, _BAND_BYTES // rows.shape[1])
    above = np.zeros_like(rows[:1])
    for top in range(0, height, step):
        band = rows[top : top + step]
        if piece := deflate.compress(_filtered(band, np.concatenate([above, band[:-1]]), pixel_bytes)):
            yield piece
        above = band[-1:]
    yield deflate.flush()


def _filtered(rows: Rows, above: Rows, pixel_bytes: int) -> Rows:
    """Rows as they are compressed, each behind the number of its filter; `above` holds what lies over each."""
    left = np.zeros_like(rows)
    left[:, pixel_bytes:] = rows[:, :-pixel_bytes]
    half = (left & above) + ((left ^ above) >> 1)  # of their sum, which itself may not fit into eight bits
    by_number = {1: rows - left, 2: rows - above, 3: rows - half}
    # As signed numbers, of which -128 is its own absolute value and counts 128 again once unsigned.
    sums = [np.abs(row.view(np.int8)).view(np.uint8).sum(axis=1, dtype=np.uint32) for row in by_number.values()]
    numbers = np.array(list(by_number), np.uint8)[np.argmin(sums, axis=0)]
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = numbers
    for number, candidate in by_number.items():
        chosen = numbers == number
        filtered[chosen, 1:] = candidate[chosen]
    return filtered
