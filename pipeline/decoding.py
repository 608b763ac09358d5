"""Image files in, upright pixels out: codecs, modes and faults on the way in.

All functions are pure and may run in many threads at once; Pillow's codecs release the GIL.
"""

import io
import re
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from pipeline.file_bytes import (
    format_by_beginning,
    has_damaged_pixels,
    is_cut_short,
    lacks_rows,
    shortened_webp,
    states_no_pixels,
    unfinished_end,
)
from pipeline.image_records import DecodedImage, Header, ImageFault, Pixels, upright
from pipeline.jpeg import read_jpeg
from pipeline.metadata import Metadata, read_metadata
from pipeline.records import Stage
from pipeline.tiff import OF_WEBP, is_misread, is_signed, mend_storage, stated_channels, tiff_tags

READ_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
"""Pillow's names of what is decoded; other formats are refused, whatever Pillow has a plugin for."""

Image.MAX_IMAGE_PIXELS = None
"""Pillow's one limit for the whole process; here each call's `max_pixels` decides, before anything is decoded."""

PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20
PngImagePlugin.MAX_TEXT_MEMORY = 256 * 2**20
"""Bytes of one text or profile and of all texts in a PNG; Pillow refuses a profile above 1 MiB, which others hold."""

_PNG_BITS = re.compile(r";(\d+)")
"""Bits per channel in Pillow's name of how a PNG's pixels are stored, for instance `L;4` or `RGB;16B`."""


@dataclass(frozen=True)
class _Layout:
    """How the file stores its pixels."""

    bit_depth: int
    greyscale: bool
    white_is_zero: bool
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
            layout = _read_layout(image, data)
            is_jpeg = _format_name(image) == "JPEG"
            stored, complaint = read_jpeg(data, in_inks=image.mode == "CMYK") if is_jpeg else (None, "")
            # Metadata of a PNG may lie behind its pixels; that of a TIFF is changed when Pillow loads it and turns it.
            if image.format == "TIFF":
                if is_misread(image):
                    raise _fault("unsupported_mode", f"TIFF files of {stated_channels(data)} are not read")
                mend_storage(image, layout.bit_depth)
            elif stored is None:
                image.load()
            metadata = read_metadata(image, data)
            if stored is None:
                image.load()
                _check_whole(image, data)
            decoded = _to_decoded(image, layout, metadata, stored)
            if complaint:
                decoded = _doubted(decoded, image, complaint)
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
    except Image.DecompressionBombError as error:
        raise _fault("too_many_pixels", f"{error}: of Pillow's own, which this program has set again") from error
    except UnidentifiedImageError as error:
        likely = format_by_beginning(beginning)
        if likely is None:
            known = ", ".join(READ_FORMATS)
            raise _fault("not_an_image", f"the content is not an image in a known format ({known})") from error
        file.seek(0)
        raise _decoding_fault(error, file.read(), likely) from error
    except Exception as error:
        file.seek(0)
        raise _decoding_fault(error, file.read(), format_by_beginning(beginning) or "image") from error


def _format_name(image: Image.Image) -> str:
    """Pillow's name; a JPEG with further pictures behind the first (MPO) counts as a JPEG."""
    return "JPEG" if image.format == "MPO" else image.format or "image"


def _check_whole(image: Image.Image, data: bytes) -> None:
    """Refuses a file whose decoder took damage, missing rows, or the zeros of an end never written, for pixels."""
    match _format_name(image):
        case "PNG":
            if has_damaged_pixels(data):
                raise _fault("unreadable", "the PNG file is damaged: the checksum of its pixels is wrong")
            last_row = np.asarray(image.crop((0, image.height - 1, image.width, image.height)))
            # Of an interlaced one, what is missing may be any rows.
            if (image.info.get("interlace") or not last_row.any()) and lacks_rows(data):
                raise _fault("truncated", "the PNG file ends before the last row of its image")
        case "JPEG":
            if zeros := unfinished_end(data):
                raise _fault("truncated", f"the JPEG file ends in {zeros} zeros, unfinished")
        case "WEBP":
            shortened = shortened_webp(data)
            if shortened is not None and _can_be_decoded(shortened):
                raise _fault("truncated", "the WEBP file ends in zeros, unfinished")


def _can_be_decoded(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
            image.load()
    except MemoryError:
        raise
    except Exception:
        return False
    return True


def _doubted(decoded: DecodedImage, image: Image.Image, complaint: str) -> DecodedImage:
    """A JPEG of which libjpeg complains, with a note; refused if its end is missing, which Pillow fills with a colour.

    A single row of one colour is what is left of that: each block after the last one has its mean.
    """
    last_row = np.asarray(image.crop((0, image.height - 1, image.width, image.height)))
    if "premature end" in complaint.lower() and bool((last_row == last_row[:, :1]).all()):
        raise _fault("truncated", f"the JPEG file lacks pixels, perhaps up to its end: {complaint}")
    return replace(decoded, warnings=(*decoded.warnings, f"the JPEG decoder warns: {complaint}"))


def _decoding_fault(error: Exception, data: bytes, name: str) -> ImageFault:
    """An exception of a decoder in plain words."""
    if isinstance(error, EOFError) or "truncated" in str(error).lower() or is_cut_short(data, name):
        return _fault("truncated", f"the {name} file is cut short: it ends after {len(data):,} bytes, before its image")
    if states_no_pixels(data, name):
        return _fault("zero_size", f"the {name} file states an image without pixels: one of its sides is 0")
    is_of_kind = isinstance(error, UnidentifiedImageError) or "unknown raw mode" in str(error)
    if name == "TIFF" and (channels := stated_channels(data)) is not None and (is_of_kind or OF_WEBP in channels):
        return _fault("unsupported_mode", f"TIFF files of {channels} are not read")
    if isinstance(error, UnidentifiedImageError):
        return _fault("unreadable", f"the file begins like a {name} file, but its header is damaged or of another kind")
    return _fault("unreadable", f"the {name} file is damaged and cannot be decoded: {error or type(error).__name__}")


# Layout


def _read_layout(image: Image.Image, data: bytes) -> _Layout:
    """How the file stores its pixels; for an image that is not loaded yet, since Pillow forgets it then."""
    bit_depth = _bit_depth(image)
    deep_mode = image.mode.startswith(("I", "F"))
    grey_mode = deep_mode or image.mode in ("1", "L", "LA", "La")
    notes = []
    if bit_depth > 8 and not deep_mode:
        notes.append(f"{bit_depth} bits per channel were read as 8: more are kept in plain greyscale only")
    if bit_depth == 16 and is_signed(image):
        notes.append("signed 16-bit greyscale was read as if white were 65535")
    frames = _count_frames(image, data)
    if frames is None:
        notes.append("the pages behind the first could not be read")
    elif frames > 1:
        notes.append(f"first of {frames} frames")
    return _Layout(
        bit_depth=bit_depth,
        greyscale=grey_mode or str(_storage(image)).startswith("LA"),  # Pillow's mode is RGBA at 16 bits
        white_is_zero=tiff_tags(image).get(ExifTags.Base.PhotometricInterpretation) == 0,
        warnings=tuple(notes),
    )


def _bit_depth(image: Image.Image) -> int:
    """Bits per channel in the file; 16 for each PGM beyond eight bits, since Pillow widens it."""
    stated = tiff_tags(image).get(ExifTags.Base.BitsPerSample)
    if stated:
        return int(stated[0] if isinstance(stated, tuple) else stated)
    if image.mode.startswith("I"):
        return 16
    match image.format, _storage(image):
        case "PPM", (_, int(maximum)):
            return maximum.bit_length()
        case "PNG", str(storage) if bits := _PNG_BITS.search(storage):
            return int(bits[1])
    return {"1": 1, "F": 32}.get(image.mode, 8)


def _storage(image: Image.Image) -> object:
    """What Pillow tells its codec of how the pixels are stored, if anything."""
    tiles = getattr(image, "tile", [])
    return tiles[0].args if tiles else None


def _count_frames(image: Image.Image, data: bytes) -> int | None:
    """Frames or pages; None if a TIFF's pointer to a further page is bad."""
    if image.format != "TIFF":
        return int(getattr(image, "n_frames", 1))
    # An opening of its own: a bad pointer leaves Pillow with the tags of neither page.
    with _open(io.BytesIO(data), data[:16]) as pages:
        try:
            return int(getattr(pages, "n_frames", 1))
        except MemoryError:
            raise
        except Exception:
            return None


# Pixels


def _to_decoded(
    image: Image.Image, layout: _Layout, metadata: Metadata, stored: NDArray[np.uint8] | None
) -> DecodedImage:
    """Turns a loaded Pillow image, or its pixels as they are `stored`, upright and into arrays."""
    mode, source_format = image.mode, _format_name(image)
    notes = list(layout.warnings)
    icc = metadata.icc
    transparent = image.info.get("transparency")
    greyscale = layout.greyscale
    pixels: Pixels
    alpha: Pixels | None = None
    if stored is not None:
        pixels = stored
    elif mode.startswith(("I", "F")):
        grey = _deep_grey(image, layout, notes)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
        if isinstance(transparent, int):
            alpha = np.where(grey == transparent, 0, 65535).astype(np.uint16)
    else:
        if mode == "CMYK":
            image = _cmyk_to_rgb(image, icc, notes)
        if mode in ("CMYK", "LAB"):
            icc = None
        if mode == "La":
            image = image.convert("LA")  # premultiplied; Pillow converts it to nothing else
        if image.has_transparency_data:
            _scale_transparent_colour(image, layout.bit_depth)
            colour_alpha = np.asarray(image.convert("RGBA"))
            pixels, alpha = colour_alpha[:, :, :3].copy(), colour_alpha[:, :, 3].copy()
            if source_format == "BMP" and not alpha.any():
                alpha = None  # a channel that its writer left empty
        else:
            pixels = np.array(_to_rgb(image))
        if mode == "P" and icc is None:
            greyscale = bool((pixels == pixels[:, :, :1]).all())
    # Pillow turns TIFF upright while it loads; every other format is left to its reader.
    turn = metadata.orientation if source_format != "TIFF" else None
    pixels = upright(pixels, turn)
    alpha = None if alpha is None else upright(alpha, turn)
    return DecodedImage(
        pixels=pixels,
        alpha=alpha,
        greyscale=greyscale,
        source_format=source_format,
        mode=mode,
        bit_depth=layout.bit_depth,
        exif_orientation=metadata.orientation,
        exif=metadata.exif,
        icc=icc,
        xmp=metadata.xmp,
        dpi=metadata.dpi,
        png_colour=metadata.png_colour,
        lossless_webp=metadata.lossless_webp,
        warnings=tuple(notes),
        lost=metadata.lost,
    )


def _scale_transparent_colour(image: Image.Image, bit_depth: int) -> None:
    """Brings a PNG's transparent colour, which Pillow leaves in the depth of the file, to the eight bits of the pixels.

    Of sixteen bits per channel, all colours that are the same in eight become transparent.
    """
    match image.mode, image.info.get("transparency"):
        case "L", int(level) if bit_depth < 8:
            image.info["transparency"] = level * 255 // (2**bit_depth - 1)
        case "RGB", (int(), int(), int()) as colour if bit_depth == 16:
            image.info["transparency"] = tuple(level >> 8 for level in colour)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # `convert` would copy it
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
