"""Image files of the tests, made by hand where no writer makes them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ImageCms

from pipeline.images import ImageFault, decode
from pipeline.records import Stage

MAX_PIXELS = 1_000_000
ORIENTATION = 0x0112
EXIF_WIDTH, EXIF_HEIGHT = 0xA002, 0xA003
DESCRIPTION = 0x010E
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(height=23, width=17, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def file_bytes(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(data, max_pixels=MAX_PIXELS):
    return decode(data, max_pixels=max_pixels)


def fault_of(data, **options):
    with pytest.raises(ImageFault) as caught:
        decode(data, **({"max_pixels": MAX_PIXELS} | options))
    assert caught.value.stage is Stage.DECODE
    return caught.value


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width, height, *, bit_depth, color_type, rows, before=b"", behind=b"", interlaced=0):
    """`before` and `behind` are chunks around the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, interlaced)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", data) + behind + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def with_segment(jpeg, kind, body):
    """A JPEG with one more segment in front."""
    return jpeg[:2] + b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]
