"""Image files in, upright pixels out: codecs, modes, EXIF and colour profiles on the way in.

All functions are pure and may run in many threads at once; Pillow's codecs release the GIL.
"""

import io
import re
import zlib
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from pipeline.image_records import DecodedImage, Header, ImageFault, Pixels
from pipeline.records import Stage

READ_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
"""Pillow's names of what is decoded; other formats are refused, whatever Pillow has a plugin for."""

Image.MAX_IMAGE_PIXELS = None
"""Pillow's one limit for the whole process; here each call's `max_pixels` decides, before anything is decoded."""

_BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0"),
    "BMP": (b"BM",),
    "GIF": (b"GIF8",),
    "PPM": tuple(f"P{kind}{space}".encode() for kind in range(1, 7) for space in " \n"),
}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation upright; 1 already is."""

_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation(?:\s*=\s*["']|\s*>\s*))[2-8](?=\s*["'<])""")

_MOST_DPI = 65_535
"""That JPEG holds."""

_DESCRIPTIVE_TIFF_TAGS = frozenset(
    {
        ExifTags.Base.ImageDescription,
        ExifTags.Base.Make,
        ExifTags.Base.Model,
        ExifTags.Base.Orientation,
        ExifTags.Base.Software,
        ExifTags.Base.DateTime,
        ExifTags.Base.Artist,
        ExifTags.Base.Copyright,
        ExifTags.IFD.Exif,
        ExifTags.IFD.GPSInfo,
    }
)
"""A TIFF keeps its layout (strips, compression) beside its EXIF; only these tags hold for another file too."""


@dataclass(frozen=True)
class _Layout:
    """Metadata read before the pixels are."""

    bit_depth: int
    greyscale: bool
    white_is_zero: bool
    orientation: int | None
    exif: bytes | None
    xmp: bytes | None
    dpi: tuple[float, float] | None
    warnings: tuple[str, ...]


def read_header(file: BinaryIO) -> Header:
    """Format, mode and size of an image file, at the cost of its first bytes; raises `ImageFault`."""
    beginning = file.read(16)
    if not beginning:
        raise _fault("empty_file", "the file is empty (0 bytes)")
    file.seek(0)
    with _open(file, beginning) as image:
        return Header(_format_name(image), image.mode, image.width, image.height)


def decode(data: bytes, *, max_pixels: int) -> DecodedImage:
    """Upright pixels and metadata of an image file in memory.

    The first frame of an animated or multi-page file is taken, with a warning.

    Args:
        data: the whole file.
        max_pixels: an image whose header states more (width x height) is refused before it is decoded.

    Raises:
        ImageFault: `data` is no complete image of a known format, is too large, or has channels that have
            no sensible reading as RGB.
    """
    if not data:
        raise _fault("empty_file", "the file is empty (0 bytes)")
    with _open(io.BytesIO(data), data[:16]) as image:
        if image.width * image.height > max_pixels:
            raise _fault(
                "too_many_pixels",
                f"the image is {image.width} x {image.height} = {image.width * image.height:,} pixels; "
                f"the limit is {max_pixels:,} (max-pixels)",
            )
        # Codecs raise nearly any exception on bytes that are not what they should be.
        try:
            layout = _read_layout(image)
            image.load()
            _check_end(data, _format_name(image))
            decoded = _to_decoded(image, layout)
        except (ImageFault, MemoryError):
            raise
        except Exception as error:
            raise _decoding_fault(error, data, _format_name(image)) from error
    return decoded


def _fault(error_class: str, message: str) -> ImageFault:
    return ImageFault(Stage.DECODE, error_class, message)


def _open(file: BinaryIO, beginning: bytes) -> Image.Image:
    """A lazily read Pillow image of a known format."""
    try:
        return Image.open(file, formats=READ_FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        likely = _format_by_beginning(beginning)
        if likely is None:
            known = ", ".join(READ_FORMATS)
            raise _fault("not_an_image", f"the content is not an image in a known format ({known})") from error
        file.seek(0)
        raise _decoding_fault(error, file.read(), likely) from error
    except Exception as error:
        file.seek(0)
        raise _decoding_fault(error, file.read(), _format_by_beginning(beginning) or "image") from error


def _format_name(image: Image.Image) -> str:
    """Pillow's name; a JPEG with further pictures behind the first (MPO) counts as a JPEG."""
    return "JPEG" if image.format == "MPO" else image.format or "image"


def _format_by_beginning(beginning: bytes) -> str | None:
    return next((name for name, starts in _BEGINNINGS.items() if beginning.startswith(starts)), None)


def _is_cut_short(data: bytes, name: str) -> bool:
    """Whether a file of the format lacks the end that its beginning promises."""
    match name:
        case "JPEG":
            return b"\xff\xd9" not in data
        case "PNG":
            return b"IEND" not in data[-4096:]
        case "WEBP":
            return len(data) < 12 or len(data) < int.from_bytes(data[4:8], "little") + 8
        case "BMP":
            return len(data) < 54 or len(data) < int.from_bytes(data[2:6], "little")
        case "TIFF":
            order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
            return len(data) < int.from_bytes(data[4:8], order) + 2
        case "GIF":
            return not data.rstrip(b"\0").endswith(b";")
    return False


def _check_end(data: bytes, name: str) -> None:
    """Refuses a PNG or JPEG file whose end was never written: its decoder takes the zeros there for pixels."""
    if name == "PNG":
        _check_png_data(data)
    elif name == "JPEG" and data.endswith(bytes(16)):
        scan = 2
        while data[scan : scan + 1] == b"\xff" and data[scan + 1] != 0xDA:
            scan += 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
        if data.find(b"\xff\xd9", scan) < 0:
            raise _fault(
                "truncated", f"the JPEG file ends in {len(data) - len(data.rstrip(bytes(1)))} zeros, unfinished"
            )


def _check_png_data(data: bytes) -> None:
    """Holds compressed pixels against their checksums, which Pillow does not."""
    view, at = memoryview(data), len(_BEGINNINGS["PNG"][0])
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise _fault("unreadable", "the PNG file is damaged: the checksum of its pixels is wrong")
        at = len(data) if kind == b"IEND" else end + 4


def _states_no_pixels(data: bytes, name: str) -> bool:
    """Whether the header says that a side is 0; Pillow takes such a file for none of its format."""
    match name:
        case "PNG":
            sides = [data[16:20], data[20:24]]
        case "BMP":
            sides = [data[18:22], data[22:26]]
        case "PPM":
            return any(int(side) == 0 for side in data[:64].split()[1:3] if side.isdigit())
        case _:
            return False
    return bytes(4) in sides


def _decoding_fault(error: Exception, data: bytes, name: str) -> ImageFault:
    """An exception of a decoder in plain words."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower() or _is_cut_short(data, name):
        return _fault("truncated", f"the {name} file is cut short: it ends after {len(data):,} bytes, before its image")
    if _states_no_pixels(data, name):
        return _fault("zero_size", f"the {name} file states an image without pixels: one of its sides is 0")
    if isinstance(error, UnidentifiedImageError):
        return _fault("unreadable", f"the file begins like a {name} file, but its header is damaged or of another kind")
    return _fault("unreadable", f"the {name} file is damaged and cannot be decoded: {error or type(error).__name__}")


# Metadata


def _read_layout(image: Image.Image) -> _Layout:
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample)
    raw_mode = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""  # type: ignore[attr-defined]
    if bits:
        bit_depth = int(bits[0] if isinstance(bits, tuple) else bits)
    elif ";16" in raw_mode or image.mode.startswith("I"):
        bit_depth = 16
    else:
        bit_depth = {"1": 1, "F": 32}.get(image.mode, 8)
    deep_mode = image.mode.startswith(("I", "F"))
    greyscale = deep_mode or image.mode in ("1", "L", "LA", "La") or raw_mode.startswith("LA")
    notes = []
    if bit_depth > 8 and not deep_mode:
        notes.append(f"{bit_depth} bits per channel were read as 8: more are kept in plain greyscale only")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"first of {frames} frames")
    orientation, exif = None, None
    try:
        orientation, exif = _upright_exif(image)
    except Exception:
        # Cameras and editors write all kinds of EXIF; the picture counts for more.
        notes.append("EXIF could not be read and was dropped")
    white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    xmp, dpi = image.info.get("xmp"), _upright_dpi(image, orientation)
    xmp = _XMP_ORIENTATION.sub(rb"\g<1>1", xmp) if isinstance(xmp, bytes) and xmp else None
    return _Layout(bit_depth, greyscale, white_is_zero, orientation, exif, xmp, dpi, tuple(notes))


def _upright_dpi(image: Image.Image, orientation: int | None) -> tuple[float, float] | None:
    """Pixels per inch across and down the upright image; None if the file says nothing that could be."""
    try:
        across, down = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not (1 <= across <= _MOST_DPI and 1 <= down <= _MOST_DPI):
        return None
    return (down, across) if orientation is not None and orientation >= 5 else (across, down)


def _upright_exif(image: Image.Image) -> tuple[int | None, bytes | None]:
    """The orientation (1..8) as stored, and the EXIF with its orientation set to 1.

    EXIF of an image that is already upright is kept byte by byte.
    """
    exif = image.getexif()
    value = exif.get(ExifTags.Base.Orientation)
    orientation = value if isinstance(value, int) and 1 <= value <= 8 else None
    if image.format == "TIFF":
        for tag in set(exif) - _DESCRIPTIVE_TIFF_TAGS:
            del exif[tag]
    elif value in (None, 1):
        return orientation, _prefixed(image.info.get("exif"))
    if not exif:
        return orientation, None
    exif.bigtiff = False  # of a BigTIFF; no other format holds such EXIF
    kept = Image.Exif()
    kept.load(exif.tobytes())
    if value is not None:
        kept[ExifTags.Base.Orientation] = 1
    return orientation, kept.tobytes()


def _prefixed(exif: bytes | None) -> bytes | None:
    """EXIF with the marker that JPEG wants before it and the other formats' writers take off."""
    if not exif or exif.startswith(b"Exif\0\0"):
        return exif or None
    return b"Exif\0\0" + exif


# Pixels


def _to_decoded(image: Image.Image, layout: _Layout) -> DecodedImage:
    """Turns a loaded Pillow image upright and into arrays."""
    mode, source_format = image.mode, _format_name(image)
    notes = list(layout.warnings)
    icc = cast(bytes | None, image.info.get("icc_profile")) or None
    transparent = image.info.get("transparency")
    # Pillow turns TIFF upright while it loads; every other format is left to its reader.
    if layout.orientation in _UPRIGHT and source_format != "TIFF":
        image = image.transpose(_UPRIGHT[layout.orientation])
    greyscale = layout.greyscale
    pixels: Pixels
    alpha: Pixels | None = None
    if mode.startswith(("I", "F")):
        grey = _deep_grey(image, layout, notes)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
        if isinstance(transparent, int):
            alpha = np.where(grey == transparent, 0, 65535).astype(np.uint16)
    else:
        if mode == "CMYK":
            image = _cmyk_to_rgb(image, icc, notes)
        if mode in ("CMYK", "LAB"):
            icc = None
        if image.has_transparency_data:
            colour_alpha = np.asarray(image.convert("RGBA"))
            pixels, alpha = colour_alpha[:, :, :3].copy(), colour_alpha[:, :, 3].copy()
        else:
            pixels = np.array(_to_rgb(image))
        if mode == "P" and icc is None:
            greyscale = bool((pixels == pixels[:, :, :1]).all())
    return DecodedImage(
        pixels=pixels,
        alpha=alpha,
        greyscale=greyscale,
        source_format=source_format,
        mode=mode,
        bit_depth=layout.bit_depth,
        exif_orientation=layout.orientation,
        exif=layout.exif,
        icc=icc,
        xmp=layout.xmp,
        dpi=layout.dpi,
        warnings=tuple(notes),
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise _fault("unsupported_mode", f"channels of mode {image.mode} cannot be read as RGB") from error


def _deep_grey(image: Image.Image, layout: _Layout, notes: list[str]) -> NDArray[np.uint16]:
    """One channel of more than eight bits, H x W uint16; adds a note where it had to be scaled."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise _fault("unsupported_mode", "floating-point values beyond 0..1 have no known white level")
        notes.append("floating-point greyscale was read as 16 bits")
        values = np.rint(values * 65535)
    elif image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise _fault("unsupported_mode", "32-bit integers beyond 0..65535 have no known white level")
    elif layout.bit_depth > 16:
        notes.append(f"{layout.bit_depth}-bit greyscale was read as 16 bits")
    elif layout.bit_depth < 16:
        notes.append(f"{layout.bit_depth}-bit greyscale was read as 16 bits")
        values = np.rint(values * (65535 / (2**layout.bit_depth - 1)))
    grey = values.astype(np.uint16)
    return 65535 - grey if layout.white_is_zero else grey


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    """CMYK as sRGB by its own profile, or by plain subtraction where it has none; adds a note on which."""
    if icc is None:
        notes.append("CMYK was converted to RGB without a colour profile")
        return image.convert("RGB")
    try:
        profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        converted = None
    if converted is None:
        notes.append("CMYK was converted to RGB without its colour profile, which is damaged")
        return image.convert("RGB")
    notes.append("CMYK was converted to sRGB by its colour profile")
    return converted
