"""Files of `pipeline.png` are read by other decoders as the pixels that went in."""

import io
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from skimage import data
from torchvision.io import ImageReadMode, decode_png

from pipeline.file_bytes import png_chunks
from pipeline.image_records import Pixels
from pipeline.png import encode_png

SIDES = st.integers(1, 40)
SHAPES = st.one_of(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, st.sampled_from([2, 3, 4])))


def _read(file: bytes) -> Pixels:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image)


def _row_filters(file: bytes, row_bytes: int) -> set[int]:
    pixels = b"".join(file[begin:end] for kind, begin, end in png_chunks(file) if kind == b"IDAT")
    return set(zlib.decompress(pixels)[:: row_bytes + 1])


@given(SHAPES.flatmap(lambda shape: arrays(np.uint8, shape)))
def test_eight_bits_come_back(pixels: Pixels) -> None:
    file = encode_png(pixels, {})
    assert np.array_equal(_read(file), pixels)
    theirs = decode_png(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.UNCHANGED).permute(1, 2, 0)
    assert np.array_equal(theirs.numpy().reshape(pixels.shape), pixels)


@given(st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays(np.uint16, shape)))
def test_sixteen_bits_come_back(pixels: Pixels) -> None:
    assert np.array_equal(_read(encode_png(pixels, {})), pixels)


@pytest.mark.parametrize("shape", [(700, 500, 3), (1, 300_000), (3, 100_000, 4), (90_000, 3)])
def test_an_image_of_several_bands_comes_back(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert np.array_equal(_read(encode_png(pixels, {})), pixels)


def test_each_row_has_the_filter_that_suits_it() -> None:
    across = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (8, 1))
    random = np.random.default_rng(1)
    same_rows = np.tile(random.integers(0, 256, (1, 60), np.uint8), (8, 1))
    assert _row_filters(encode_png(across[:1], {}), 60) == {1}
    assert 2 in _row_filters(encode_png(same_rows, {}), 60)
    photograph = data.astronaut()[:200, :200]
    assert _row_filters(encode_png(photograph, {}), 600) == {1, 2, 3}


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "page"])
def test_files_are_hardly_larger_than_pillows(name: str) -> None:
    pixels = getattr(data, name)()
    theirs = io.BytesIO()
    Image.fromarray(pixels).save(theirs, "PNG", compress_level=2)
    assert len(encode_png(pixels, {})) < 1.1 * len(theirs.getvalue())


def test_what_stands_beside_the_pixels_is_pillows() -> None:
    pixels = data.chelsea()
    exif = Image.Exif()
    exif[0x010E] = "a cat"
    with Image.open(io.BytesIO(encode_png(pixels, {"exif": exif, "dpi": (300, 300)}))) as image:
        assert image.getexif()[0x010E] == "a cat"
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert np.array_equal(np.asarray(image), pixels)
