"""Files to pixels and back: modes, orientation, metadata, and nothing but `ImageFault` for bad bytes."""

import errno
import io
import os
import struct
from dataclasses import replace

import numpy as np
import PIL
import pytest
import simplejpeg
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import (
    DESCRIPTION,
    ORIENTATION,
    SRGB,
    fault_of,
    file_bytes,
    picture,
    png_chunk,
    raw_png,
    read,
    with_segment,
)
from PIL import Image, ImageOps, JpegImagePlugin, TiffImagePlugin
from skimage import data as samples

from pipeline import decoding
from pipeline.file_bytes import shortened_webp
from pipeline.images import ImageFault, as_grey_as, decode, encode, encoded_format, read_header, to_uint8
from pipeline.jpeg import read_jpeg
from pipeline.records import Stage

GREY = picture(channels=1)
DEEP = GREY.astype(np.uint16) * 256 + picture(channels=1, seed=1)
LOSSLESS = {
    "1": (Image.fromarray(GREY).convert("1"), ("PNG", "TIFF", "BMP", "PPM")),
    "L": (Image.fromarray(GREY), ("PNG", "TIFF", "BMP", "PPM")),
    "LA": (Image.fromarray(picture(channels=2)), ("PNG", "TIFF")),
    "P": (Image.fromarray(picture()).quantize(16), ("PNG", "TIFF", "BMP")),
    "I;16": (Image.fromarray(DEEP), ("PNG", "TIFF", "PPM")),
    "RGB": (Image.fromarray(picture()), ("PNG", "TIFF", "BMP", "PPM")),
    "RGBA": (Image.fromarray(picture(channels=4)), ("PNG", "TIFF")),
    "CMYK": (Image.fromarray(picture(channels=4), "CMYK"), ("TIFF",)),
}
CASES = [(mode, name) for mode, (_, names) in LOSSLESS.items() for name in names]


def assert_same_image(decoded, other):
    np.testing.assert_array_equal(decoded.pixels, other.pixels)
    assert decoded.pixels.dtype == other.pixels.dtype
    assert decoded.greyscale == other.greyscale
    assert (decoded.alpha is None) == (other.alpha is None)
    if decoded.alpha is not None:
        np.testing.assert_array_equal(decoded.alpha, other.alpha)


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_pixels_are_those_that_pillow_converts(mode, name):
    image = LOSSLESS[mode][0]
    decoded = read(file_bytes(image, name))
    assert decoded.source_format == name
    assert (decoded.height, decoded.width) == (23, 17)
    if mode == "I;16":
        np.testing.assert_array_equal(decoded.pixels, np.repeat(DEEP[:, :, None], 3, axis=2))
    else:
        np.testing.assert_array_equal(decoded.pixels, np.asarray(image.convert("RGB")))
    assert decoded.greyscale == (mode in ("1", "L", "LA", "I;16"))
    assert (decoded.alpha is not None) == (mode in ("LA", "RGBA"))
    # Pillow writes a palette of 16 colours in 4 bits, as PNG only.
    assert decoded.bit_depth == {("P", "PNG"): 4}.get((mode, name), {"1": 1, "I;16": 16}.get(mode, 8))


@pytest.mark.parametrize("format", ["same", "png"])
@pytest.mark.parametrize(("mode", "name"), CASES)
def test_lossless_round_trip_is_identity(mode, name, format):
    decoded = read(file_bytes(LOSSLESS[mode][0], name))
    encoded = encode(decoded, decoded.pixels, format=format, quality=95)
    assert encoded.format == (name if format == "same" else "PNG")
    assert encoded.warnings == ()
    again = read(encoded.data)
    assert_same_image(decoded, again)
    assert (encoded.width, encoded.height, encoded.mode) == (again.width, again.height, again.mode)


def test_the_mode_told_of_a_file_is_the_one_that_it_has():
    """WebP drops alpha that hides nothing."""
    channels = picture(channels=4)
    for alpha, mode in ((channels[:, :, 3], "RGBA"), (255, "RGB")):
        channels[:, :, 3] = alpha
        decoded = read(file_bytes(Image.fromarray(channels), "PNG"))
        encoded = encode(decoded, decoded.pixels, format="webp", quality=95)
        assert (encoded.mode, read(encoded.data).mode) == (mode, mode)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    channels=st.sampled_from([1, 2, 3, 4]),
    deep=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_png_round_trip_is_identity_for_any_size(height, width, channels, deep, seed):
    values = picture(height, width, channels, seed)
    deep = deep and channels == 1
    image = Image.fromarray(values.astype(np.uint16) * 257) if deep else Image.fromarray(values)
    decoded = read(file_bytes(image, "PNG"))
    assert decoded.pixels.shape == (height, width, 3)
    assert_same_image(decoded, read(encode(decoded, decoded.pixels, format="png", quality=95).data))


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_cmyk_becomes_the_colour_that_was_meant(name):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = read(file_bytes(red, name))
    assert decoded.mode == "CMYK"
    np.testing.assert_allclose(decoded.pixels.reshape(-1, 3).mean(axis=0), [255, 0, 0], atol=3)
    assert "without a colour profile" in decoded.warnings[0]
    encoded = encode(decoded, decoded.pixels, format="same", quality=95)
    assert (encoded.format, encoded.mode) == (name, "RGB")


def test_inverted_cmyk_of_adobe_is_read_as_such():
    data = file_bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in data
    np.testing.assert_allclose(read(data).pixels[8, 8], [255, 0, 0], atol=3)


def test_cmyk_with_a_damaged_profile_is_still_read():
    data = file_bytes(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF", icc_profile=b"no profile at all")
    decoded = read(data)
    assert decoded.icc is None
    assert "damaged" in decoded.warnings[0]


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "I;16"])
def test_transparent_colour_of_a_png_becomes_alpha(mode):
    image = {
        "P": Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) // 4, "L").convert("P"),
        "RGB": Image.fromarray(picture(3, 4)),
        "L": Image.fromarray(picture(3, 4, 1)),
        "I;16": Image.fromarray(picture(3, 4, 1).astype(np.uint16) * 200),
    }[mode]
    colour = image.getpixel((1, 1))
    decoded = read(file_bytes(image, "PNG", transparency=colour))
    assert decoded.alpha is not None
    assert decoded.alpha.dtype == decoded.pixels.dtype
    assert decoded.alpha[1, 1] == 0
    assert decoded.alpha.max() == np.iinfo(decoded.alpha.dtype).max


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_grey_of_a_png_of_few_bits_becomes_alpha(bits):
    levels = [0, 2**bits - 1, 1]
    row = int("".join(f"{level:0{bits}b}" for level in levels).ljust(24, "0"), 2).to_bytes(3, "big")
    trns = png_chunk(b"tRNS", struct.pack(">H", 2**bits - 1))
    decoded = read(raw_png(3, 1, bit_depth=bits, color_type=0, rows=[row[: (3 * bits + 7) // 8]], before=trns))
    assert decoded.bit_depth == bits
    assert decoded.alpha.tolist() == [[255, 0, 0 if bits == 1 else 255]]


def test_transparent_colour_of_sixteen_bits_becomes_alpha():
    colours = np.array([[0x1234, 0x5678, 0x9ABC], [0x1034, 0x5078, 0x90BC], [0x3434, 0x7878, 0xBCBC]], dtype=">u2")
    trns = png_chunk(b"tRNS", colours[0].tobytes())
    decoded = read(raw_png(3, 1, bit_depth=16, color_type=2, rows=[colours.tobytes()], before=trns))
    assert decoded.alpha.tolist() == [[0, 255, 255]]


def test_grey_palette_stays_greyscale_and_colour_palette_does_not():
    grey = Image.fromarray(GREY).convert("P")
    decoded = read(file_bytes(grey, "PNG"))
    assert decoded.mode == "P"
    assert decoded.greyscale
    assert encode(decoded, decoded.pixels, format="same", quality=95).mode == "L"
    assert not read(file_bytes(Image.fromarray(picture()).quantize(8), "PNG")).greyscale


def test_tint_of_a_restored_grey_image_is_averaged_away():
    decoded = read(file_bytes(Image.fromarray(GREY), "PNG"))
    tinted = decoded.pixels.copy()
    tinted[..., 0] = 10
    tinted[..., 1] = 20
    tinted[..., 2] = 33
    again = read(encode(decoded, tinted, format="same", quality=95).data)
    assert again.greyscale
    assert (again.pixels == 21).all()


@pytest.mark.parametrize(("byte_order", "white_is_zero"), [("<", False), (">", False), ("<", True)])
def test_sixteen_bit_tiff_of_either_byte_order_and_polarity(byte_order, white_is_zero):
    entries = [
        (256, 4, 17),
        (257, 4, 23),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 0),
        (277, 3, 1),
        (278, 4, 23),
    ]
    entries.append((279, 4, DEEP.nbytes))
    offset = 8 + 2 + 12 * len(entries) + 4
    data = (b"II" if byte_order == "<" else b"MM") + struct.pack(byte_order + "HIH", 42, 8, len(entries))
    for tag, kind, value in entries:
        value = offset if tag == 273 else value
        packed = struct.pack(byte_order + "HH", value, 0) if kind == 3 else struct.pack(byte_order + "I", value)
        data += struct.pack(byte_order + "HHI", tag, kind, 1) + packed
    data += b"\0\0\0\0" + DEEP.astype(byte_order + "u2").tobytes()
    decoded = read(data)
    assert decoded.pixels.dtype == np.uint16
    assert decoded.warnings == ()
    np.testing.assert_array_equal(decoded.pixels[:, :, 0], 65535 - DEEP if white_is_zero else DEEP)
    assert_same_image(decoded, read(encode(decoded, decoded.pixels, format="same", quality=95).data))


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_is_read_as_eight_and_says_so(color_type, channels):
    values = np.random.default_rng(3).integers(0, 65536, (4, 5, channels)).astype(">u2")
    decoded = read(raw_png(5, 4, bit_depth=16, color_type=color_type, rows=[row.tobytes() for row in values]))
    assert decoded.pixels.dtype == np.uint8
    assert decoded.bit_depth == 16
    assert decoded.greyscale == (color_type == 4)
    assert "16 bits per channel were read as 8" in decoded.warnings[0]
    high = (values >> 8).astype(np.uint8)
    np.testing.assert_array_equal(decoded.pixels[:, :, 0], high[:, :, 0])


@pytest.mark.parametrize("kind", ["P3", "P6"])
@pytest.mark.parametrize(("maximum", "bits"), [(65535, 16), (1023, 10)])
def test_ppm_of_more_than_eight_bits_is_read_as_eight_and_says_so(kind, maximum, bits):
    values = np.random.default_rng(3).integers(0, maximum + 1, (4, 5, 3))
    body = values.astype(">u2").tobytes() if kind == "P6" else " ".join(map(str, values.ravel())).encode()
    decoded = read(f"{kind} 5 4 {maximum}\n".encode() + body)
    assert decoded.bit_depth == bits
    assert f"{bits} bits per channel were read as 8" in decoded.warnings[0]
    np.testing.assert_allclose(decoded.pixels, values * (255 / maximum), atol=0.51)


@pytest.mark.parametrize(("maximum", "bits"), [(255, 8), (65535, 16)])
def test_depth_of_greyscale_ppm_is_kept(maximum, bits):
    decoded = read(f"P5 1 1 {maximum}\n".encode() + bytes([7] * (bits // 8)))
    assert (decoded.bit_depth, decoded.warnings) == (bits, ())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_depth_of_a_png_palette_is_that_of_the_file(bits):
    data = file_bytes(Image.fromarray(picture()).quantize(2**bits), "PNG")
    decoded = read(data)
    assert (data[24], decoded.bit_depth, decoded.warnings) == (bits, bits, ())


def tiff_bytes(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, metadata=None, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("extra", [None, ("unassalpha",)])
def test_sixteen_bit_planes_of_a_tiff_are_the_colours_beside_each_other(compression, order, tile, extra):
    values = picture(40, 30, 4 if extra else 3).astype(np.uint16) * 256 + 128
    options = {
        "byteorder": order,
        "photometric": "rgb",
        "compression": compression,
        "tile": tile,
        "extrasamples": extra,
    }
    beside = read(tiff_bytes(values, planarconfig="contig", **options))
    planes = read(tiff_bytes(np.moveaxis(values, 2, 0), planarconfig="separate", **options))
    assert_same_image(planes, beside)
    np.testing.assert_array_equal(planes.pixels, values[:, :, :3] >> 8)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["f4", "i2", "i4"])
def test_deep_greyscale_of_a_tiff_is_the_same_in_either_byte_order(compression, order, kind):
    values = DEEP // 2
    stored = (values / 65535).astype(np.float32) if kind == "f4" else values.astype(kind)
    decoded = read(tiff_bytes(stored, byteorder=order, photometric="minisblack", compression=compression))
    np.testing.assert_array_equal(decoded.pixels[:, :, 0], values)
    assert any("signed" in note for note in decoded.warnings) == (kind == "i2")


@pytest.mark.parametrize("kind", ["i2", "i4", "f4"])
def test_a_single_plane_of_deep_numbers_is_read_in_its_order(kind):
    values = DEEP // 2
    stored = (values / 65535).astype(kind) if kind == "f4" else values.astype(kind)
    options = {"byteorder": ">", "photometric": "minisblack", "compression": "zlib"}
    data = tiff_bytes(stored, extratags=[(285, 3, 1, 2, True)], **options)  # one that may be written
    data = data.replace(struct.pack(">HHIH", 285, 3, 1, 2), struct.pack(">HHIH", 284, 3, 1, 2))
    with Image.open(io.BytesIO(data)) as image:
        assert image.tag_v2[284] == 2
    np.testing.assert_array_equal(read(data).pixels[:, :, 0], values)


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_a_single_plane_of_a_tiff_is_read_whatever_its_tag_says_of_planes(white_is_zero):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[284], info[262] = 2, int(not white_is_zero)
    stored = file_bytes(Image.fromarray(GREY), "TIFF", tiffinfo=info)
    with Image.open(io.BytesIO(stored)) as image:
        assert (image.tag_v2[284], image.tag_v2[262]) == (2, int(not white_is_zero))
    np.testing.assert_array_equal(read(stored).pixels[:, :, 0], GREY)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow reads such files from 13 on")
def test_premultiplied_greyscale_of_a_tiff_is_divided_by_its_alpha():
    grey, alpha = picture(channels=1), np.maximum(picture(channels=1, seed=1), 64)
    stored = np.dstack([np.rint(grey * (alpha / 255.0)).astype(np.uint8), alpha])
    decoded = read(tiff_bytes(stored, photometric="minisblack", extrasamples=("assocalpha",)))
    assert decoded.greyscale
    np.testing.assert_array_equal(decoded.alpha, alpha)
    np.testing.assert_allclose(decoded.pixels[:, :, 0].astype(int), grey, atol=3)


@pytest.mark.parametrize(
    ("values", "options", "stated"),
    [
        (picture().astype(np.float32), {}, "3 x 32 floating-point bits (little-endian, photometric interpretation 2)"),
        (picture().astype(np.int16), {"byteorder": ">"}, "3 x 16 signed bits (big-endian, photometric"),
        (np.moveaxis(picture(channels=4).astype(np.uint16), 2, 0),
         {"photometric": "separated", "planarconfig": "separate"},
         "4 x 16 bits, plane by plane (little-endian, photometric interpretation 5)"),
        (picture().astype(np.float32), {"bigtiff": True}, "3 x 32 floating-point bits (little-endian, BigTIFF"),
        (picture(), {"bigtiff": True, "byteorder": ">"}, "3 x 8 bits (big-endian, BigTIFF"),
        (GREY.astype(np.int8), {"photometric": "minisblack"}, "1 x 8 signed bits (little-endian"),
        (np.moveaxis(picture(channels=2), 2, 0),
         {"photometric": "minisblack", "planarconfig": "separate", "extrasamples": ("unassalpha",),
          "compression": "zlib"},
         "2 x 8 bits, plane by plane (little-endian, photometric interpretation 1, compression 8)"),
    ],
)  # fmt: skip
def test_kinds_of_tiff_that_are_not_read_are_called_so(values, options, stated):
    fault = fault_of(tiff_bytes(values, **({"photometric": "rgb"} | options)))
    assert fault.error_class == "unsupported_mode"
    assert str(fault).startswith(f"TIFF files of {stated}")


def with_tag(tiff, tag, old, new):
    """A little-endian TIFF with another value in a tag of one short number."""
    entry = struct.pack("<HHI", tag, 3, 1)
    assert tiff.count(entry + struct.pack("<H", old)) == 1
    return tiff.replace(entry + struct.pack("<H", old), entry + struct.pack("<H", new))


def test_a_tiff_of_webp_is_of_another_kind_and_not_damaged():
    fault = fault_of(with_tag(tiff_bytes(picture(), photometric="rgb", compression="zlib"), 259, 8, 50001))
    assert fault.error_class == "unsupported_mode"
    assert "compression 50001" in str(fault)


def test_uncompressed_ycbcr_with_fewer_colours_than_pixels_is_not_read_as_if_it_had_all():
    data = tiff_bytes(picture(24, 20), photometric="ycbcr", subsampling=(1, 1))
    if int(PIL.__version__.split(".")[0]) >= 13:
        assert read(data).mode == "YCbCr"
    else:  # it takes four bytes for each pixel, also those of what comes behind
        assert fault_of(data + bytes(len(data))).error_class == "unsupported_mode"
    whole, halved = (struct.pack("<HHIHH", 530, 3, 2, each, each) for each in (1, 2))
    assert data.count(whole) == 1
    fault = fault_of(data.replace(whole, halved))
    assert fault.error_class == "unsupported_mode"
    assert "3 x 8 bits, subsampled" in str(fault)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow takes uncompressed YCbCr for RGB")
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"rowsperstrip": 8}])
def test_uncompressed_ycbcr_that_does_not_say_how_many_colours_it_has_is_told_by_its_bytes(layout):
    """As Pillow itself wrote it once: by the standard the colours would have half the size."""
    data = tiff_bytes(picture(24, 20), photometric="ycbcr", subsampling=(1, 1), **layout)
    whole = struct.pack("<HHI", 530, 3, 2)
    assert data.count(whole) == 1
    untold = data.replace(whole, struct.pack("<HHI", 65000, 3, 2))
    np.testing.assert_array_equal(read(untold).pixels, read(data).pixels)
    if not layout:
        assert data.count(struct.pack("<I", 24 * 20 * 3)) == 1
        halved = untold.replace(struct.pack("<I", 24 * 20 * 3), struct.pack("<I", 24 * 20 * 3 // 2))
        assert "3 x 8 bits, subsampled" in str(fault_of(halved))


def test_a_tag_of_another_type_is_no_reason_to_fail_otherwise():
    """What a message is made of may be damaged too."""
    data = tiff_bytes(picture().astype(np.float32), photometric="rgb")
    entry = struct.pack("<HHI", 339, 3, 3)
    assert data.count(entry) == 1
    data = data.replace(entry, struct.pack("<HHI", 339, 2, 3))
    assert fault_of(data).error_class == "unsupported_mode"
    with pytest.raises(ImageFault):  # by which planning passes such a file over
        read_header(io.BytesIO(data))


def test_an_empty_alpha_channel_of_a_bmp_hides_nothing():
    channels = picture(channels=4)
    for alpha, hidden in ((0, False), (7, True)):
        channels[:, :, 3] = alpha
        stored = channels[::-1, :, [2, 1, 0, 3]].tobytes()
        masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        header = struct.pack("<IiiHHIIiiII", 108, 17, 23, 1, 32, 3, len(stored), 0, 0, 0, 0) + masks + bytes(108 - 56)
        data = struct.pack("<2sIHHI", b"BM", 14 + 108 + len(stored), 0, 0, 14 + 108) + header + stored
        decoded = read(data)
        np.testing.assert_array_equal(decoded.pixels, channels[:, :, :3])
        assert (decoded.alpha is not None) == hidden


def test_floating_point_greyscale_in_the_unit_range_becomes_sixteen_bits():
    values = (GREY / 255).astype(np.float32)
    decoded = read(file_bytes(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(decoded.pixels[:, :, 0], np.rint(values * 65535))
    assert decoded.bit_depth == 32
    assert decoded.warnings
    assert fault_of(file_bytes(Image.fromarray(values * 300), "TIFF")).error_class == "unsupported_mode"


def test_integers_without_a_white_level_are_refused():
    values = GREY.astype(np.int32)
    assert read(file_bytes(Image.fromarray(values), "TIFF")).pixels.dtype == np.uint16
    assert fault_of(file_bytes(Image.fromarray(values * 1000), "TIFF")).error_class == "unsupported_mode"


def test_first_frame_of_several_with_a_warning():
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    for name in ("TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if name == "WEBP" else {}
        decoded = read(file_bytes(frames[0], name, save_all=True, append_images=frames[1:], **options))
        np.testing.assert_array_equal(decoded.pixels, picture(seed=0))
        assert decoded.warnings == ("first of 3 frames",)


@pytest.mark.parametrize("pointer", [99_999_999, 2**32 - 1, 20, 1])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_with_a_bad_pointer_to_the_next_page_is_read(pointer, compression):
    exif = Image.Exif()
    exif[ORIENTATION], exif[DESCRIPTION] = 6, "the first page"
    image = Image.fromarray(picture())
    data = bytearray(file_bytes(image, "TIFF", exif=exif, dpi=(300, 150), compression=compression))
    whole = read(bytes(data))
    directory = int.from_bytes(data[4:8], "little")
    at = directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], "little")
    assert data[at : at + 4] == bytes(4)
    data[at : at + 4] = pointer.to_bytes(4, "little")
    decoded = read(bytes(data))
    assert decoded.warnings == ("the pages behind the first could not be read",)
    assert_same_image(decoded, whole)
    assert (decoded.exif, decoded.dpi) == (whole.exif, whole.dpi)


def test_gif_content_is_written_as_png_with_a_warning():
    decoded = read(file_bytes(Image.fromarray(GREY).convert("P"), "GIF"))
    encoded = encode(decoded, decoded.pixels, format="same", quality=95)
    assert encoded.format == encoded_format("GIF", "same") == "PNG"
    assert encoded.warnings == ("GIF was written as PNG",)


def test_alpha_is_composed_over_white_where_the_format_has_none():
    pixels = np.full((4, 4, 4), 100, dtype=np.uint8)
    pixels[:2, :, 3], pixels[2:, :, 3] = 0, 255
    decoded = read(file_bytes(Image.fromarray(pixels), "PNG"))
    encoded = encode(decoded, decoded.pixels, format="jpeg", quality=100)
    assert encoded.warnings == ("JPEG has no alpha: composed over white",)
    written = read(encoded.data)
    assert written.alpha is None
    assert written.pixels[0, 0].min() > 240
    np.testing.assert_allclose(written.pixels[3, 3], 100, atol=4)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_reduced_depth_is_named(format):
    decoded = read(file_bytes(Image.fromarray(DEEP), "PNG"))
    encoded = encode(decoded, decoded.pixels, format=format, quality=95)
    assert encoded.warnings == (f"16 bits were reduced to 8: {encoded.format} is not written deeper",)
    decoded = replace(decoded, alpha=np.full(DEEP.shape, 65535, np.uint16))
    (note,) = encode(decoded, decoded.pixels, format="png", quality=95).warnings
    assert note == "16 bits were reduced to 8: PNG is not written deeper beside alpha"


@pytest.mark.parametrize("channels", [GREY, DEEP])
def test_a_result_is_as_grey_as_its_source(channels):
    source = np.repeat(channels[:, :, None], 3, axis=2)
    result = np.random.default_rng(0).integers(0, 200, source.shape).astype(source.dtype)
    assert np.ptp(as_grey_as(source, result), axis=2).max() == 0
    for channel, step in ((0, 1), (1, 1), (1, -2), (2, -1)):
        tinted = source.clip(2, 250).astype(int)
        tinted[5, 5, channel] += step
        assert as_grey_as(tinted.astype(source.dtype), result) is result


@pytest.mark.parametrize("quality", [30, 80, 95])
def test_grey_in_a_lossy_webp_is_grey(quality):
    source = read(file_bytes(Image.fromarray(GREY).convert("RGB"), "WEBP", quality=quality)).pixels
    assert np.ptp(as_grey_as(source, picture()), axis=2).max() == 0


def test_quality_reaches_the_encoder():
    decoded = read(file_bytes(Image.fromarray(picture(64, 64)), "PNG"))
    sizes = [len(encode(decoded, decoded.pixels, format="jpeg", quality=quality).data) for quality in (30, 95)]
    assert sizes[0] < sizes[1] / 2


def test_jpeg_keeps_the_resolution_of_colour():
    decoded = read(file_bytes(Image.fromarray(picture(64, 64)), "PNG"))
    encoded = encode(decoded, decoded.pixels, format="jpeg", quality=95)
    with Image.open(io.BytesIO(encoded.data)) as written:
        assert JpegImagePlugin.get_sampling(written) == 0


@pytest.mark.parametrize("animated", [False, True])
@pytest.mark.parametrize("lossless", [False, True])
def test_a_lossless_webp_stays_lossless(lossless, animated):
    frames = {"save_all": True, "append_images": [Image.fromarray(picture(seed=1))]} if animated else {}
    decoded = read(file_bytes(Image.fromarray(picture()), "WEBP", lossless=lossless, **frames))
    assert decoded.lossless_webp == lossless
    again = read(encode(decoded, decoded.pixels, format="same", quality=95).data)
    assert again.lossless_webp == lossless
    assert np.array_equal(again.pixels, decoded.pixels) == lossless
    assert not read(encode(decoded, decoded.pixels, format="webp", quality=95).data).lossless_webp


def test_colours_that_a_lossless_webp_hides_stay():
    channels = picture(channels=4)
    channels[:, :, 3] = 0
    decoded = read(file_bytes(Image.fromarray(channels), "WEBP", lossless=True, exact=True))
    assert_same_image(decoded, read(encode(decoded, decoded.pixels, format="same", quality=95).data))


LINEAR, BT2020_PQ, OF_SRGB = b"\0\1\x86\xa0", b"\x09\x10\0\1", b"\0\0\xb1\x8f"


@pytest.mark.parametrize(
    ("kind", "body"), [(b"gAMA", LINEAR), (b"cICP", BT2020_PQ), (b"gAMA", OF_SRGB), (b"sRGB", b"\0")]
)
def test_what_the_numbers_of_a_png_mean_is_kept_or_named(kind, body):
    rows = [row.tobytes() for row in picture()]
    data = raw_png(17, 23, bit_depth=8, color_type=2, rows=rows, before=png_chunk(kind, body))
    decoded = read(data)
    kept = encode(decoded, decoded.pixels, format="same", quality=95)
    assert png_chunk(kind, body) in kept.data
    assert kept.warnings == ()
    notes = encode(decoded, decoded.pixels, format="jpeg", quality=95).warnings
    assert len(notes) == (body in (LINEAR, BT2020_PQ))


@pytest.mark.parametrize(
    "chunks", [(b"gAMA", LINEAR, b"sRGB", b"\0"), (b"gAMA", LINEAR, b"cICP", b"\x01\x0d\0\1")], ids=["sRGB", "cICP"]
)
def test_the_chunk_that_counts_says_what_a_png_means(chunks):
    both = png_chunk(*chunks[:2]) + png_chunk(*chunks[2:])
    decoded = read(raw_png(17, 23, bit_depth=8, color_type=2, rows=[r.tobytes() for r in picture()], before=both))
    assert encode(decoded, decoded.pixels, format="jpeg", quality=95).warnings == ()


def test_an_image_that_a_format_cannot_hold_is_a_fault_of_encoding():
    decoded = read(file_bytes(Image.new("RGB", (16_400, 1)), "PNG"))
    with pytest.raises(ImageFault) as caught:
        encode(decoded, decoded.pixels, format="webp", quality=95)
    assert (caught.value.stage, caught.value.error_class) == (Stage.ENCODE, "not_encodable")


def test_encode_refuses_other_shapes_and_formats():
    decoded = read(file_bytes(Image.fromarray(picture()), "PNG"))
    with pytest.raises(ValueError, match=r"\(22, 17, 3\)"):
        encode(decoded, decoded.pixels[1:], format="same", quality=95)
    with pytest.raises(ValueError, match="choose same, png, jpeg, webp"):
        encode(decoded, decoded.pixels, format="avif", quality=95)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("orientation", [None, 6])
def test_a_tiff_of_either_size_has_its_orientation(big, orientation):
    upright = picture()
    stored = upright if orientation is None else np.ascontiguousarray(np.rot90(upright))
    buffer = io.BytesIO()
    tags = [] if orientation is None else [(ORIENTATION, "H", 1, orientation, True)]
    tifffile.imwrite(buffer, stored, bigtiff=big, photometric="rgb", extratags=tags, metadata=None)
    decoded = read(buffer.getvalue())
    assert (decoded.exif_orientation, decoded.warnings) == (orientation, ())
    np.testing.assert_array_equal(decoded.pixels, upright)


def test_a_profile_for_greyscale_is_dropped_where_colours_are_written():
    profile = bytearray(SRGB)
    profile[16:20] = b"GRAY"
    decoded = read(file_bytes(Image.fromarray(picture(channels=1)), "PNG", icc_profile=bytes(profile)))
    for format, kept in (("same", bytes(profile)), ("jpeg", bytes(profile)), ("webp", None)):
        encoded = encode(decoded, decoded.pixels, format=format, quality=95)
        assert Image.open(io.BytesIO(encoded.data)).info.get("icc_profile") == kept
        assert any("profile was dropped" in warning for warning in encoded.warnings) == (kept is None)


def test_to_uint8_rounds_to_the_nearest_level():
    deep = np.array([0, 128, 129, 257, 65535 - 129, 65535], dtype=np.uint16)
    np.testing.assert_array_equal(to_uint8(deep), np.rint(deep / 257).astype(np.uint8))
    eight = picture()
    assert to_uint8(eight) is eight


# Bad input


@pytest.mark.parametrize(
    ("data", "error_class"),
    [
        (b"", "empty_file"),
        (b"hello, this is text and no image", "not_an_image"),
        (b"\0" * 500, "not_an_image"),
        (b"\x89PNG\r\n\x1a\n" + b"garbage" * 50, "truncated"),
        (raw_png(0, 4, bit_depth=8, color_type=0, rows=[b""]), "zero_size"),
        (b"P6 4 0 255\n", "zero_size"),
        (b"P6 4 4 255\n" + bytes(20), "truncated"),
        (raw_png(40_000, 40_000, bit_depth=8, color_type=0, rows=[b""]), "too_many_pixels"),
        (raw_png(2_000, 2_000, bit_depth=8, color_type=0, rows=[b""]), "too_many_pixels"),
    ],
)
def test_bad_files_have_their_own_error_class(data, error_class):
    fault = fault_of(data)
    assert fault.error_class == error_class
    assert str(fault) == fault.message != ""


def test_pixel_limit_counts_exactly():
    data = file_bytes(Image.fromarray(picture(10, 20)), "PNG")
    assert decode(data, max_pixels=200).width == 20
    fault = fault_of(data, max_pixels=199)
    assert "20 x 10 = 200 pixels; the limit is 199" in str(fault)


def test_pillow_has_no_limit_of_its_own(recwarn):
    data = file_bytes(Image.new("1", (20_000, 10_000)), "PNG")  # twice what Pillow refuses by default
    assert read_header(io.BytesIO(data)).width == 20_000
    assert fault_of(data, max_pixels=199_999_999).error_class == "too_many_pixels"
    assert not list(recwarn)


def test_a_limit_that_the_program_has_set_in_pillow_counts_too(monkeypatch):
    data = file_bytes(Image.new("1", (100, 100)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    fault = fault_of(data)
    assert fault.error_class == "too_many_pixels"
    assert "exceeds limit of 2000 pixels" in str(fault)


def test_jpeg_is_encoded_where_the_system_has_no_files_in_memory_too(monkeypatch):
    source = read(file_bytes(Image.new("RGB", (7, 9), (99, 80, 70)), "JPEG"))
    expected = encode(source, source.pixels, format="jpeg", quality=90)

    def refuse(name):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert encode(source, source.pixels, format="jpeg", quality=90) == expected


def test_a_file_in_memory_that_finds_none_is_full_memory(monkeypatch):
    source = read(file_bytes(Image.new("RGB", (7, 9), (99, 80, 70)), "JPEG"))

    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", refuse)
    with pytest.raises(MemoryError, match="No space left"):
        encode(source, source.pixels, format="jpeg", quality=90)


def test_full_memory_is_no_damage_of_the_file(monkeypatch):
    def exhausted(*_):
        raise MemoryError

    data = file_bytes(Image.fromarray(picture(10, 20)), "PNG")
    monkeypatch.setattr(decoding, "_to_decoded", exhausted)
    with pytest.raises(MemoryError):
        decode(data, max_pixels=200)


def test_header_is_read_without_the_pixels():
    data = file_bytes(Image.fromarray(picture(64, 48)), "JPEG")
    header = read_header(io.BytesIO(data[: len(data) // 2]))
    assert (header.format, header.mode, header.width, header.height) == ("JPEG", "RGB", 48, 64)
    with pytest.raises(ImageFault, match="empty"):
        read_header(io.BytesIO(b""))


SMOOTH = Image.fromarray(np.add.outer(np.arange(40), np.arange(32)).astype(np.uint8)).convert("RGB")
VALID = {
    "JPEG": file_bytes(SMOOTH, "JPEG", quality=90),
    "progressive JPEG": file_bytes(SMOOTH, "JPEG", quality=90, progressive=True),
    "PNG": file_bytes(SMOOTH, "PNG"),
    "palette PNG": file_bytes(SMOOTH.quantize(8), "PNG"),
    "WEBP": file_bytes(SMOOTH, "WEBP"),
    "lossless WEBP": file_bytes(SMOOTH, "WEBP", lossless=True),
    "TIFF": file_bytes(SMOOTH, "TIFF"),
    "deflated TIFF": file_bytes(SMOOTH, "TIFF", compression="tiff_adobe_deflate"),
    "BMP": file_bytes(SMOOTH, "BMP"),
    "PPM": file_bytes(SMOOTH, "PPM"),
    "GIF": file_bytes(SMOOTH.quantize(8), "GIF"),
}


@pytest.mark.parametrize("name", VALID)
def test_a_file_cut_anywhere_is_a_fault_or_whole(name):
    data = VALID[name]
    whole = read(data).pixels
    step = max(1, len(data) // 150)
    faults = set()
    for end in [*range(0, len(data), step), len(data) - 1]:
        try:
            decoded = read(data[:end])
        except ImageFault as fault:
            faults.add(fault.error_class)
        else:
            np.testing.assert_array_equal(decoded.pixels, whole, err_msg=f"cut after {end} of {len(data)} bytes")
    assert "truncated" in faults
    assert faults <= {"empty_file", "truncated", "not_an_image", "unreadable"}
    assert fault_of(data[: len(data) // 2]).error_class == "truncated"


@pytest.mark.parametrize("name", ["PNG", "JPEG"])
def test_a_file_whose_end_was_never_written_is_a_fault(name):
    """What a power cut leaves of a file: its size, and zeros."""
    data = file_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)), name)
    for share in (0.1, 0.5, 0.9, 0.99):
        kept = round(share * len(data))
        assert fault_of(data[:kept] + bytes(len(data) - kept)).error_class in {"unreadable", "truncated"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (130, 64)])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2, "progressive": True}, {"restart_marker_blocks": 2},
     {"keep_rgb": True}, {"grey": True}],
    ids=str,
)  # fmt: skip
def test_pixels_of_a_jpeg_are_those_of_pillow_to_the_bit(options, size, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(picture(*size))
    options = dict(options)
    data = file_bytes(image.convert("L") if options.pop("grey", False) else image, "JPEG", exif=exif, **options)
    assert read_jpeg(data, in_inks=False)[0] is not None
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(read(data).pixels, np.asarray(ImageOps.exif_transpose(opened).convert("RGB")))


def test_a_jpeg_with_a_damaged_scan_is_noted_and_one_without_its_end_refused():
    noise = file_bytes(Image.fromarray(picture(160, 200)), "JPEG", quality=90)
    half = len(noise) // 2
    fault = fault_of(noise[:half] + b"\xff\xd9")
    assert fault.error_class == "truncated"
    assert str(fault).startswith("the JPEG file lacks pixels, perhaps up to its end: Corrupt JPEG data: premature end")
    with_restarts = file_bytes(Image.fromarray(picture(160, 200)), "JPEG", quality=90, restart_marker_blocks=4)
    marker = with_restarts.index(b"\xff\xd3", len(with_restarts) // 3)
    decoded = read(with_restarts[: marker - 200] + with_restarts[marker:])
    (note,) = decoded.warnings
    assert note.startswith("the JPEG decoder warns: Corrupt JPEG data")
    with Image.open(io.BytesIO(with_restarts[: marker - 200] + with_restarts[marker:])) as opened:
        np.testing.assert_array_equal(decoded.pixels, np.asarray(opened))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_damage_of_a_jpeg_in_inks_or_grey_is_told_too(mode):
    image = Image.fromarray(picture(160, 200, 4), "CMYK").convert(mode)
    whole = file_bytes(image, "JPEG", quality=90)
    assert not any("JPEG decoder" in note for note in read(whole).warnings)
    assert fault_of(whole[: len(whole) // 2] + b"\xff\xd9").error_class == "truncated"
    middle = len(whole) // 2
    notes = read(whole[:middle] + bytes(100) + whole[middle + 100 :]).warnings
    assert any(note.startswith("the JPEG decoder warns: Corrupt JPEG data") for note in notes)


@pytest.mark.parametrize("kind", ["JFIF of another version", "profile", "bytes between segments"])
def test_what_stands_before_the_pixels_of_a_jpeg_hides_no_damage_of_theirs(kind):
    whole = file_bytes(Image.fromarray(picture(160, 200)), "JPEG", quality=90, restart_marker_blocks=4)
    match kind:
        case "profile":
            whole = with_segment(whole, 0xE2, b"ICC_PROFILE\0\x01\x09nonsense")
        case "bytes between segments":
            at = whole.index(b"\xff\xc0")
            whole = whole[:at] + b"\x01\x02\x03" + whole[at:]
        case _:
            whole = whole.replace(b"JFIF\0\x01", b"JFIF\0\x07")
    assert not any("premature" in note for note in read(whole).warnings)
    assert fault_of(whole[: len(whole) // 2] + b"\xff\xd9").error_class == "truncated"


def test_full_memory_in_libjpeg_is_full_memory(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise ValueError("Insufficient memory (case 4)")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", full)
    with pytest.raises(MemoryError, match="Insufficient memory"):
        read(file_bytes(Image.fromarray(picture()), "JPEG"))


@pytest.mark.parametrize(
    "said", ["Could not determine subsampling level of JPEG image", "Unsupported color conversion"]
)
def test_a_jpeg_of_a_kind_that_the_library_does_not_read_is_read_by_pillow_without_a_word(monkeypatch, said):
    def unknown(*_: object, **__: object) -> None:
        raise ValueError(said)

    data = file_bytes(Image.fromarray(picture()), "JPEG")
    monkeypatch.setattr(simplejpeg, "decode_jpeg", unknown)
    decoded = read(data)
    assert decoded.warnings == ()
    np.testing.assert_array_equal(decoded.pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True}], ids=str)
def test_a_webp_whose_end_was_never_written_is_a_fault(options):
    whole = file_bytes(Image.fromarray(samples.coffee()), "WEBP", **options)
    kept = len(whole) * 3 // 4
    fault = fault_of(whole[:kept] + bytes(len(whole) - kept))
    assert (fault.error_class, str(fault)) == ("truncated", "the WEBP file ends in zeros, unfinished")


@pytest.mark.parametrize(
    "options",
    [{"quality": 100, "method": 0}, {"quality": 95, "method": 0}, {"lossless": True, "quality": 0, "method": 0}],
    ids=str,
)
def test_a_webp_that_ends_in_zeros_of_its_own_is_whole(options):
    """As the picture of a page does, fast or without loss encoded."""
    page = np.full((1800, 2400, 3), 255, np.uint8)
    page[:800] = np.tile(np.asarray(samples.coffee()), (2, 4, 1))
    stored = file_bytes(Image.fromarray(page), "WEBP", **options)
    assert shortened_webp(stored) is not None, "no picture to try it on"
    np.testing.assert_array_equal(read(stored, max_pixels=5_000_000).pixels, np.asarray(Image.open(io.BytesIO(stored))))


@pytest.mark.parametrize(
    ("bit_depth", "color_type", "row"), [(8, 2, b"\x07" * 30), (1, 0, b"\xff\xff"), (16, 4, b"\x07" * 40)]
)
def test_a_png_without_its_last_rows_is_a_fault_and_one_that_ends_in_black_is_none(bit_depth, color_type, row):
    header = {"bit_depth": bit_depth, "color_type": color_type}
    fault = fault_of(raw_png(10, 9, rows=[row] * 5, **header))
    assert (fault.error_class, str(fault)) == ("truncated", "the PNG file ends before the last row of its image")
    assert read(raw_png(10, 9, rows=[row] * 5 + [bytes(len(row))] * 4, **header)).pixels.shape == (9, 10, 3)


@pytest.mark.parametrize("size", [(23, 17), (24, 16), (5, 1), (1, 5), (1, 1)])
def test_an_interlaced_png_without_its_last_rows_is_a_fault(size):
    values = picture(*size)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [row.tobytes() for x, y, across, down in passes for row in values[y::down, x::across] if row.size]
    header = {"bit_depth": 8, "color_type": 2, "interlaced": 1}
    np.testing.assert_array_equal(read(raw_png(*size[::-1], rows=rows, **header)).pixels, values)
    for kept in range(1, len(rows)):
        assert fault_of(raw_png(*size[::-1], rows=rows[:kept], **header)).error_class == "truncated"


def test_zeros_behind_a_jpeg_are_no_fault():
    data = file_bytes(Image.fromarray(picture(10, 20)), "JPEG")
    assert read(data + bytes(100)).pixels.shape == (10, 20, 3)


@pytest.mark.parametrize("fill", [1, 3])
def test_fill_bytes_before_a_marker_are_no_fault(fill):
    data = with_segment(file_bytes(Image.fromarray(picture(60, 80)), "JPEG"), 0xE5, b"a thumbnail's end: \xff\xd9")
    data = data[:2] + b"\xff" * fill + data[2:]
    assert read(data + bytes(100)).pixels.shape == (60, 80, 3)
    assert fault_of(data[: len(data) // 2] + bytes(len(data) // 2)).error_class == "truncated"


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), start=st.sampled_from([b"", *{value[:24] for value in VALID.values()}]))
def test_random_bytes_raise_nothing_but_faults(data, start):
    with pytest.raises(ImageFault):
        read(start + data)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(VALID)),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
)
def test_damaged_files_raise_nothing_but_faults(name, changes):
    data = bytearray(VALID[name])
    for position, value in changes:
        data[position % len(data)] = value
    try:
        decoded = read(bytes(data))
    except ImageFault:
        return
    assert decoded.pixels.shape == (decoded.height, decoded.width, 3)
