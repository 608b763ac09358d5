"""What a file has beside its pixels comes out as it holds for the result."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from picture_files import (
    DESCRIPTION,
    EXIF_HEIGHT,
    EXIF_WIDTH,
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
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

from pipeline.images import encode

ARTIST = "Jos\u00e9 M\u00fcller".encode()
WINDOWS_TEXT = "\u00e9\u00fc\u00df".encode("utf-16le")


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_gives_the_same_upright_picture_and_is_kept(name, orientation):
    upright = np.kron(picture(5, 3), np.ones((16, 16, 1), dtype=np.uint8))
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION], exif[DESCRIPTION] = orientation, "a rotated camera"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    exif.get_ifd(0x8769).update({EXIF_WIDTH: turned.shape[1], EXIF_HEIGHT: turned.shape[0]})
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(name, {})
    # Pillow stores a TIFF's EXIF directory only when it is given as bytes.
    data = file_bytes(Image.fromarray(np.ascontiguousarray(turned)), name, exif=exif.tobytes(), **options)
    decoded = read(data)
    assert decoded.exif_orientation == orientation
    assert decoded.warnings == ()
    tolerance = 2 if name == "JPEG" else 0
    np.testing.assert_allclose(decoded.pixels.astype(int), upright.astype(int), atol=tolerance)
    for format in ("same", "png", "jpeg", "webp"):
        with Image.open(io.BytesIO(encode(decoded, decoded.pixels, format=format, quality=95).data)) as written:
            if written.format != "TIFF":  # which Pillow turns upright
                assert written.size == (turned.shape[1], turned.shape[0])
            assert written.getexif().get(ORIENTATION) == orientation
            assert written.getexif().get(DESCRIPTION) == "a rotated camera"
            details = written.getexif().get_ifd(0x8769)
            assert details.get(0x9003) == "2026:01:02 03:04:05"
            assert (details[EXIF_WIDTH], details[EXIF_HEIGHT]) == (turned.shape[1], turned.shape[0])
    again = read(encode(decoded, decoded.pixels, format="same" if name == "TIFF" else "png", quality=95).data)
    assert again.exif_orientation == orientation
    np.testing.assert_array_equal(again.pixels, decoded.pixels)


@pytest.mark.parametrize(
    "unexpected",
    [
        pytest.param(struct.pack(">HHI4s", 0x128, 2, 2, b"2\0\0\0"), id="ResolutionUnit as text"),
        pytest.param(struct.pack(">HHI4s", 0x11A, 2, 3, b"72\0\0"), id="XResolution as text"),
        pytest.param(struct.pack(">HHI4s", 0x213, 7, 1, b"\1\0\0\0"), id="YCbCrPositioning of no type"),
    ],
)
def test_exif_of_a_turned_photograph_is_kept_whatever_else_it_holds(unexpected):
    orientation = struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
    jpeg = file_bytes(Image.fromarray(picture()), "JPEG")
    plain, odd = (
        with_segment(jpeg, 0xE1, b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(tags)) + b"".join(tags) + bytes(4))
        for tags in ([orientation], sorted([orientation, unexpected]))
    )
    decoded = read(odd)
    assert (decoded.exif_orientation, decoded.warnings) == (6, ())
    assert unexpected in decoded.exif
    assert orientation in decoded.exif
    np.testing.assert_array_equal(decoded.pixels, read(plain).pixels)


def exif_block(order, directory, details):
    """EXIF of two directories, of (tag, type, count, value or offset of bytes) each; all packed values follow it."""
    stored, at = b"", 8 + 2 + 12 * (len(directory) + 1) + 4 + 2 + 12 * len(details) + 4
    pointer = at - (2 + 12 * len(details) + 4)
    blocks = []
    for entries in ([*directory, (0x8769, 4, 1, struct.pack(order + "I", pointer))], details):
        packed = b""
        for tag, kind, count, value in sorted(entries):
            if len(value) > 4:
                value, stored = struct.pack(order + "I", at + len(stored)), stored + value
            packed += struct.pack(order + "HHI", tag, kind, count) + value.ljust(4, b"\0")
        blocks.append(struct.pack(order + "H", len(entries)) + packed + bytes(4))
    return b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8) + b"".join(blocks) + stored


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_of_a_turned_photograph_is_kept_byte_by_byte(order, name):
    def stored(orientation, across, down):
        def short(number):
            return struct.pack(order + "H", number)

        def ratio(number):
            return struct.pack(order + "II", number, 1)

        directory = [
            (0x0100, 3, 1, short(across)), (0x0101, 4, 1, struct.pack(order + "I", down)),
            (0x0112, 3, 1, short(orientation)), (0x011A, 5, 1, ratio(across)), (0x011B, 5, 1, ratio(down)),
            (0x013B, 2, 14, ARTIST + b"\0"), (0x9C9D, 1, 6, WINDOWS_TEXT),
        ]  # fmt: skip
        details = [(0x927C, 7, 12, b"maker's note"), (0xA002, 3, 1, short(across)), (0xA003, 3, 1, short(down))]
        return exif_block(order, directory, details)

    decoded = read(file_bytes(Image.fromarray(picture()), name, exif=stored(6, 17, 23)))
    written = Image.open(io.BytesIO(encode(decoded, decoded.pixels, format="same", quality=95).data))
    assert b"Exif\0\0" + written.info["exif"].removeprefix(b"Exif\0\0") == stored(6, 17, 23)


@pytest.mark.parametrize("xmp_beside_it", [False, True])
def test_text_of_a_tiff_keeps_every_letter(xmp_beside_it):
    text = {315: ARTIST, 0x8298: "\u00a9 Zo\u00eb".encode("latin-1")}
    buffer = io.BytesIO()
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in text.items():
        info[tag] = value
    if xmp_beside_it:
        info[700] = xmp(1)
    Image.fromarray(picture()).save(buffer, "TIFF", tiffinfo=info)
    decoded = read(buffer.getvalue())
    for format in ("same", "png", "jpeg", "webp"):
        encoded = encode(decoded, decoded.pixels, format=format, quality=95)
        tags = Image.open(io.BytesIO(encoded.data)).getexif()
        assert {tag: tags[tag].encode("latin-1") for tag in text} == text
        assert encoded.warnings == ()


def test_what_windows_says_of_a_tiff_is_kept():
    """Stars, and title, comment, author, keywords and subject."""
    stated = {0x4746: 4, 0x4749: 75} | dict.fromkeys(range(0x9C9B, 0x9CA0), WINDOWS_TEXT)
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in stated.items():
        info[tag] = value
    decoded = read(file_bytes(Image.fromarray(picture()), "TIFF", tiffinfo=info))
    for format in ("same", "png", "jpeg", "webp"):
        encoded = encode(decoded, decoded.pixels, format=format, quality=95)
        tags = Image.open(io.BytesIO(encoded.data)).getexif()
        assert {tag: tags.get(tag) for tag in stated} == stated


def test_a_tiff_is_compressed_unless_it_holds_a_cameras_details():
    flat = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))
    scanned = read(file_bytes(flat, "TIFF", software="a scanner's"))
    shot = read(file_bytes(flat, "TIFF", exif=exif_block("<", [], [(0xA430, 2, 4, b"Zoe\0")])))
    for decoded, expected in ((scanned, "tiff_adobe_deflate"), (shot, "raw")):
        with Image.open(io.BytesIO(encode(decoded, decoded.pixels, format="same", quality=95).data)) as written:
            assert written.info["compression"] == expected
            np.testing.assert_array_equal(np.asarray(written), decoded.pixels)


def test_letters_that_a_tiffs_exif_loses_are_noted():
    """Pillow writes the details' text as ASCII."""
    block = exif_block("<", [], [(0xA430, 2, 5, "Zo\u00eb".encode("utf-8") + b"\0")])
    decoded = read(file_bytes(Image.fromarray(picture()), "TIFF", exif=block))
    assert decoded.warnings == ()
    data = file_bytes(Image.fromarray(picture()), "TIFF", exif=block).replace(b"Zo??", "Zo\u00eb".encode())
    assert read(data).lost == ("letters beyond ASCII in EXIF's details were replaced by ?",)


def test_exif_that_imagemagick_wrote_into_a_png_is_kept():
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[ORIENTATION], exif[DESCRIPTION] = orientation, "kept"
        stored = exif.tobytes()
        text = PngImagePlugin.PngInfo()
        text.add_text("Raw profile type exif", f"\nexif\n{len(stored):8}\n{stored.hex()}\n")
        decoded = read(file_bytes(Image.fromarray(picture()), "PNG", pnginfo=text))
        written = Image.open(io.BytesIO(encode(decoded, decoded.pixels, format="same", quality=95).data)).getexif()
        assert (written[ORIENTATION], written[DESCRIPTION]) == (orientation, "kept")


def test_orientation_of_a_tiff_outlives_exif_that_cannot_be_written_again():
    upright, artist = picture(), (315, "2I", 1, (3, 7), True)
    buffer = io.BytesIO()
    tags = [(ORIENTATION, "H", 1, 6, True), artist]
    stored = np.ascontiguousarray(np.rot90(upright))
    tifffile.imwrite(
        buffer, stored, photometric="rgb", extratags=tags, metadata=None, resolution=(300, 150), resolutionunit="INCH"
    )
    decoded = read(buffer.getvalue())
    assert (decoded.exif_orientation, decoded.exif, decoded.dpi) == (6, None, (300, 150))
    assert decoded.lost == ("EXIF could not be read and was dropped",)
    np.testing.assert_array_equal(decoded.pixels, upright)
    again = read(encode(decoded, decoded.pixels, format="same", quality=95).data)
    assert again.exif_orientation == 6
    np.testing.assert_array_equal(again.pixels, upright)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_colour_profile_is_carried(name):
    decoded = read(file_bytes(Image.fromarray(picture()), name, icc_profile=SRGB))
    for format in ("same", "png", "jpeg", "webp"):
        encoded = encode(decoded, decoded.pixels, format=format, quality=95)
        assert Image.open(io.BytesIO(encoded.data)).info["icc_profile"] == SRGB


def test_a_png_holds_the_largest_profile_that_others_do():
    profile = np.random.default_rng(0).bytes(1_500_000)
    decoded = read(file_bytes(Image.fromarray(picture()), "JPEG", icc_profile=profile))
    assert read(encode(decoded, decoded.pixels, format="png", quality=95).data).icc == profile


def png_with_text(*sizes):
    texts = [png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size), 1)) for size in sizes]
    return raw_png(1, 1, bit_depth=8, color_type=0, rows=[b"\x07"], before=b"".join(texts))


def test_text_in_a_png_may_be_large_within_bounds():
    assert read(png_with_text(40 * 2**20, 40 * 2**20)).pixels.max() == 7
    assert fault_of(png_with_text(64 * 2**20 + 1)).error_class == "unreadable"


@pytest.mark.parametrize("name", ["TIFF", "PNG", "JPEG"])
def test_a_colour_profile_that_is_none_is_dropped_with_a_warning(name):
    match name:
        case "TIFF":
            buffer = io.BytesIO()
            tags = [(34675, "H", 4, (1, 2, 3, 4), True)]
            tifffile.imwrite(buffer, picture(), photometric="rgb", extratags=tags, metadata=None)
            data = buffer.getvalue()
        case "PNG":
            chunk = png_chunk(b"iCCP", b"ICC\0\0not deflated")
            data = raw_png(1, 1, bit_depth=8, color_type=0, rows=[b"\x07"], before=chunk)
        case "JPEG":
            fragment = b"ICC_PROFILE\0\x01\x02" + SRGB  # the first of two
            data = with_segment(file_bytes(Image.fromarray(picture()), "JPEG"), 0xE2, fragment)
    decoded = read(data)
    assert decoded.icc is None
    assert decoded.lost == ("the colour profile could not be read and was dropped",)
    for format in ("same", "png", "jpeg", "webp"):
        assert encode(decoded, decoded.pixels, format=format, quality=95).data


def xmp(orientation):
    """As editors write it: as an attribute, or as an element."""
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{orientation}" xmp:Rating="4">'
        f"<tiff:Orientation>{orientation}</tiff:Orientation>caf\u00e9</rdf:Description></x:xmpmeta>"
    ).encode()


def with_xmp(name, orientation, **options):
    match name:
        case "PNG":
            chunks = PngImagePlugin.PngInfo()
            chunks.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode())
            options["pnginfo"] = chunks
        case "TIFF":
            options["exif"] = options.get("exif", Image.Exif())
            options["exif"][700] = xmp(orientation)
            options["exif"] = options["exif"].tobytes()
        case _:
            options["xmp"] = xmp(orientation)
    return file_bytes(Image.fromarray(picture()), name, **options)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("exif", [False, True])
def test_xmp_is_carried_and_its_orientation_holds(name, exif):
    options = {"exif": Image.Exif()} if exif else {}
    if exif:
        options["exif"][DESCRIPTION] = "beside it"
    decoded = read(with_xmp(name, 1, **options))
    for format in ("same", "png", "jpeg", "webp"):
        written = Image.open(io.BytesIO(encode(decoded, decoded.pixels, format=format, quality=95).data))
        written.load()
        assert written.info["xmp"] == xmp(1)
        assert (DESCRIPTION in written.getexif()) == exif
    turned = read(with_xmp(name, 6, **options))
    encoded = encode(turned, turned.pixels, format="same", quality=95)
    assert (DESCRIPTION in Image.open(io.BytesIO(encoded.data)).getexif()) == exif
    assert (read(encoded.data).xmp, read(encoded.data).exif_orientation) == (xmp(6), 6)
    again = read(encode(turned, turned.pixels, format="png", quality=95).data)
    np.testing.assert_array_equal(again.pixels, turned.pixels)
    assert encoded.warnings == ()


def test_xmp_of_a_motion_photo_is_dropped_with_a_warning():
    said = xmp(1).replace(b"xmp:Rating", b'GCamera:MotionPhoto="1" xmp:Rating')
    decoded = read(file_bytes(Image.fromarray(picture()), "JPEG", xmp=said))
    assert decoded.xmp is None
    assert decoded.lost == ("XMP was dropped: it speaks of a video or gain map behind the picture",)
    turned = read(file_bytes(Image.fromarray(picture()), "JPEG", xmp=said.replace(b"1", b"6")))
    assert read(encode(turned, turned.pixels, format="same", quality=95).data).exif_orientation == 6


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_thumbnail_of_the_unrestored_photograph_is_left_out(order):
    """Everything else of an upright photograph's EXIF stays in its place, to the byte."""
    small = file_bytes(Image.new("RGB", (16, 16)), "JPEG")

    def directory(following, *entries):
        packed = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
        return struct.pack(order + "H", len(entries)) + packed + struct.pack(order + "I", following)

    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    behind = 8 + 2 + 12 + 4 + 2 + 24 + 4
    first = directory(26, (0x0100, 17))
    tiff = start + first + directory(0, (0x0201, behind), (0x0202, len(small))) + small
    source = file_bytes(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0" + tiff)
    assert Image.open(io.BytesIO(source)).getexif().get_ifd(ExifTags.IFD.IFD1)
    decoded = read(source)
    written = Image.open(io.BytesIO(encode(decoded, decoded.pixels, format="same", quality=95).data))
    assert written.getexif().get_ifd(ExifTags.IFD.IFD1) == {}
    assert written.getexif()[0x0100] == 17
    assert written.info["exif"] == b"Exif\0\0" + start + directory(0, (0x0100, 17)) + tiff[26:]


def test_xmp_too_large_for_jpeg_is_dropped_with_a_warning():
    data = file_bytes(Image.fromarray(picture()), "WEBP", xmp=b"<x/>" * 20_000)
    decoded = read(data)
    assert "XMP was dropped" in encode(decoded, decoded.pixels, format="jpeg", quality=95).warnings[0]
    decoded = read(file_bytes(Image.fromarray(picture()), "WEBP", xmp=b"x" * 65_504))
    assert encode(decoded, decoded.pixels, format="jpeg", quality=95).warnings == ()


def test_xmp_that_is_not_utf8_is_kept_as_it_is_or_dropped_with_a_warning():
    packet = "<x>caf\u00e9</x>".encode("latin-1")
    decoded = read(file_bytes(Image.fromarray(picture()), "JPEG", xmp=packet))
    encoded = encode(decoded, decoded.pixels, format="png", quality=95)
    assert encoded.warnings == ("XMP was dropped: it is not UTF-8, as PNG holds it",)
    assert read(encoded.data).xmp is None
    for format in ("same", "webp"):
        encoded = encode(decoded, decoded.pixels, format=format, quality=95)
        assert (read(encoded.data).xmp, encoded.warnings) == (packet, ())


def test_extended_xmp_is_dropped_with_a_warning():
    packet = b"<rdf:Description xmpNote:HasExtendedXMP='00' xmp:Rating='4'/>"
    extension = b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 32 + struct.pack(">II", 100, 0) + b"e" * 100
    data = with_segment(file_bytes(Image.fromarray(picture()), "JPEG", xmp=packet), 0xE1, extension)
    decoded = read(data)
    assert decoded.xmp == b"<rdf:Description xmp:Rating='4'/>"
    assert decoded.lost == ("extended XMP was dropped",)


def test_xmp_shows_no_unrestored_thumbnail():
    packet = b'<rdf:Description tiff:Orientation="8" tiff:ImageWidth="17" xmp:Rating="4">%s</rdf:Description>'
    shot = b"<xmp:Thumbnails><rdf:Alt><rdf:li xmpGImg:image='AAAA'/></rdf:Alt></xmp:Thumbnails>"
    assert read(file_bytes(Image.fromarray(picture()), "JPEG", xmp=packet % shot)).xmp == packet % b""


@pytest.mark.parametrize("orientation", [1, 6])
def test_xmp_behind_the_pixels_of_a_png_is_kept(orientation):
    exif = Image.Exif()
    exif[DESCRIPTION] = "before them"
    data = raw_png(
        2,
        1,
        bit_depth=8,
        color_type=0,
        rows=[b"\x01\x02"],
        before=png_chunk(b"eXIf", exif.tobytes()[6:]),
        behind=png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(orientation)),
    )
    decoded = read(data)
    assert (decoded.xmp, decoded.warnings) == (xmp(orientation), ())
    assert b"before them" in decoded.exif
    assert (decoded.height, decoded.width) == ((1, 2) if orientation == 1 else (2, 1))


@pytest.mark.parametrize("kind", [2, 6])
def test_xmp_of_an_unexpected_type_costs_a_tiff_nothing_else(kind):
    buffer = io.BytesIO()
    packet = b'<rdf:Description tiff:Orientation="6"/>'
    tags = [(700, kind, len(packet), packet, True)]
    tifffile.imwrite(buffer, picture(), photometric="rgb", extratags=tags, metadata=None, description="kept")
    decoded = read(buffer.getvalue())
    assert (decoded.xmp, decoded.lost) == (None, ("XMP could not be read and was dropped",))
    assert b"kept" in decoded.exif
    np.testing.assert_array_equal(decoded.pixels, picture())


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "BMP"])
def test_resolution_is_carried(name):
    decoded = read(file_bytes(Image.fromarray(picture()), name, dpi=(300, 150)))
    for format in ("same", "png", "jpeg"):
        written = Image.open(io.BytesIO(encode(decoded, decoded.pixels, format=format, quality=95).data))
        assert written.info["dpi"] == pytest.approx((300, 150), abs=0.05)


def test_resolution_is_that_of_the_stored_rows():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert read(file_bytes(Image.fromarray(picture()), "JPEG", exif=exif, dpi=(300, 150))).dpi == (300, 150)


def test_a_tiff_that_states_no_resolution_has_none():
    decoded = read(file_bytes(Image.fromarray(picture()), "TIFF"))
    assert decoded.dpi is None
    for format in ("png", "jpeg"):
        written = Image.open(io.BytesIO(encode(decoded, decoded.pixels, format=format, quality=95).data))
        assert "dpi" not in written.info


@pytest.mark.parametrize("density", [(0, 0), (0, 9)])
def test_a_resolution_that_cannot_be_is_dropped(density):
    data = bytearray(file_bytes(Image.fromarray(picture()), "JPEG", dpi=(300, 300)))
    at = data.index(b"JFIF") + 8
    data[at : at + 4] = struct.pack(">HH", *density)
    decoded = read(bytes(data))
    assert decoded.dpi is None
    assert encode(decoded, decoded.pixels, format="same", quality=95).warnings == ()


def test_damaged_exif_costs_the_exif_and_not_the_picture():
    data = file_bytes(Image.fromarray(picture()), "PNG", exif=b"Exif\0\0nonsense")
    decoded = read(data)
    assert decoded.pixels.shape == (23, 17, 3)
    assert encode(decoded, decoded.pixels, format="jpeg", quality=95).data


def test_exif_too_large_for_jpeg_is_dropped_with_a_warning():
    exif = Image.Exif()
    exif[DESCRIPTION] = "x" * 70_000
    decoded = read(file_bytes(Image.fromarray(picture()), "PNG", exif=exif))
    encoded = encode(decoded, decoded.pixels, format="jpeg", quality=95)
    assert "EXIF was dropped" in encoded.warnings[0]


@pytest.mark.parametrize("format", ["JPEG", "MPO"])
def test_what_lies_behind_a_jpeg_is_not_lost_without_a_word(format):
    whole = file_bytes(Image.fromarray(picture()), format, exif=exif_block("<", [], []))
    assert read(whole + b"SEFT" + bytes(9000)).lost == ()
    video = b"ftyp" + bytes(range(1, 251)) * 20
    decoded = read(whole + video + bytes(9))
    (note,) = decoded.lost
    assert note.startswith("5,004 bytes behind the picture were dropped")
    assert encode(decoded, decoded.pixels, format="same", quality=95).warnings == decoded.lost
    assert decoded.warnings == (), "of a photograph that is kept it would not be true"


def test_channels_and_places_that_a_tiff_loses_are_noted():
    def lost(channels, **options):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, picture(channels=channels), photometric="rgb", metadata=None, **options)
        return read(buffer.getvalue()).lost

    assert lost(3) == lost(4, extrasamples=["unassalpha"]) == ()
    assert lost(4, extrasamples=["unspecified"]) == ("channels beside the colours were dropped: 1",)
    scale = [(33550, "d", 3, (10.0, 10.0, 0.0), True)]
    assert lost(3, extratags=scale) == ("the georeference (GeoTIFF) was dropped",)
