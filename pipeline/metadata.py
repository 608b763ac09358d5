"""What an image file has beside its pixels, as it holds for the upright result: EXIF, XMP, profile, resolution."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from PIL import ExifTags, Image

from pipeline.file_bytes import is_lossless_webp, png_colour

_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation(?:\s*=\s*["']|\s*>\s*))[2-8](?=\s*["'<])""")

_XMP_OF_MORE = re.compile(rb"Container:Directory|:MicroVideo|:MotionPhoto|hdrgm:")
"""Of motion photos and Ultra HDR, whose further parts are not kept."""

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

_ACROSS_AND_DOWN = (
    (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight),
    (ExifTags.Base.FocalPlaneXResolution, ExifTags.Base.FocalPlaneYResolution),
)
"""EXIF's tags of the two directions of a picture, beside its resolution, which is read apart."""


@dataclass(frozen=True)
class Metadata:
    """What the file has beside its pixels."""

    orientation: int | None
    exif: bytes | None
    icc: bytes | None
    xmp: bytes | None
    dpi: tuple[float, float] | None
    png_colour: tuple[tuple[bytes, bytes], ...]
    lossless_webp: bool
    warnings: tuple[str, ...]


def read_metadata(image: Image.Image, data: bytes) -> Metadata:
    """That of an image which Pillow has loaded, but for a TIFF, from `data`, the whole file."""
    notes = []
    for key, name in (("xmp", "XMP"), ("icc_profile", "the colour profile")):
        if not isinstance(image.info.get(key, b""), bytes):
            # Pillow looks for an orientation in XMP as well, and would fail here.
            del image.info[key]
            notes.append(f"{name} could not be read and was dropped")
    orientation, exif = None, None
    try:
        orientation = _stated_orientation(image.getexif())
        exif = _upright_exif(image)
    except Exception:
        # Cameras and editors write all kinds of EXIF; the picture counts for more.
        notes.append("EXIF could not be read and was dropped")
    xmp = image.info.get("xmp") or None
    if xmp and _XMP_OF_MORE.search(xmp):
        notes.append("XMP was dropped: it speaks of a video or gain map behind the picture")
        xmp = None
    elif xmp and b"HasExtendedXMP" in xmp:
        notes.append("extended XMP was dropped")
    return Metadata(
        orientation=orientation,
        exif=exif,
        icc=image.info.get("icc_profile") or None,
        xmp=_XMP_ORIENTATION.sub(rb"\g<1>1", xmp) if xmp else None,
        dpi=_upright_dpi(image, orientation),
        png_colour=png_colour(data) if image.format == "PNG" else (),
        lossless_webp=image.format == "WEBP" and is_lossless_webp(data),
        warnings=tuple(notes),
    )


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Those of the page that is open; none of another format."""
    return cast(Mapping[int, Any], getattr(image, "tag_v2", {}))


def _stated_orientation(exif: Image.Exif) -> int | None:
    """The orientation (1..8) as stored."""
    value = exif.get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def lies(orientation: object) -> bool:
    """Whether the file's rows are the upright picture's columns."""
    return orientation in (5, 6, 7, 8)


def _upright_dpi(image: Image.Image, orientation: int | None) -> tuple[float, float] | None:
    """Pixels per inch across and down the upright image; None if the file says nothing that could be."""
    if image.format == "TIFF" and not {ExifTags.Base.XResolution, ExifTags.Base.YResolution} <= set(tiff_tags(image)):
        return None  # where Pillow says 1
    try:
        across, down = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not (1 <= across <= _MOST_DPI and 1 <= down <= _MOST_DPI):
        return None
    return (down, across) if lies(orientation) else (across, down)


def _upright_exif(image: Image.Image) -> bytes | None:
    """The EXIF as of the upright picture, without a thumbnail; that of an upright image byte by byte."""
    exif = image.getexif()
    value = exif.get(ExifTags.Base.Orientation)
    if image.format == "TIFF":
        for tag in set(exif) - _DESCRIPTIVE_TIFF_TAGS:
            del exif[tag]
    elif value in (None, 1):
        return _without_thumbnail(_prefixed(image.info.get("exif")))
    if not exif:
        return None
    exif.bigtiff = False  # of a BigTIFF; no other format holds such EXIF
    kept = Image.Exif()
    kept.load(exif.tobytes())
    if value is not None:
        kept[ExifTags.Base.Orientation] = 1
    if lies(value):
        details = kept.get_ifd(ExifTags.IFD.Exif)
        for across, down in _ACROSS_AND_DOWN:
            if across in details and down in details:
                details[across], details[down] = details[down], details[across]
    return kept.tobytes()


def _without_thumbnail(exif: bytes | None) -> bytes | None:
    """EXIF that ends its list of pictures after the first; the thumbnail would show the photograph unrestored.

    Nothing moves, since makers' notes may hold offsets of their own.
    """
    if exif is None:
        return None
    tiff = bytearray(exif.removeprefix(b"Exif\0\0"))
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    first = int.from_bytes(tiff[4:8], order)
    following = first + 2 + 12 * int.from_bytes(tiff[first : first + 2], order)
    if following + 4 <= len(tiff):
        tiff[following : following + 4] = bytes(4)
    return b"Exif\0\0" + bytes(tiff)


def _prefixed(exif: bytes | None) -> bytes | None:
    """EXIF with the marker that JPEG wants before it and the other formats' writers take off."""
    if not exif or exif.startswith(b"Exif\0\0"):
        return exif or None
    return b"Exif\0\0" + exif
