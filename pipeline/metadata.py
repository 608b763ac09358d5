"""What an image file has beside its pixels, as it holds for its result: EXIF, XMP, profile, resolution."""

import re
from dataclasses import dataclass
from typing import Literal

from PIL import ExifTags, Image

from pipeline.file_bytes import bytes_behind_jpeg, is_lossless_webp, png_colour
from pipeline.tiff import tiff_tags

_XMP_OF_MORE = re.compile(rb"Container:Directory|:MicroVideo|:MotionPhoto|hdrgm:")
"""Of motion photos and Ultra HDR, whose further parts are not kept."""

_XMP_THUMBNAILS = re.compile(rb"<(xmp|xap):Thumbnails>.*?</\1:Thumbnails>", re.DOTALL)
"""Which would show the photograph unrestored."""

_XMP_EXTENDED = re.compile(
    rb"""\s+xmpNote:HasExtendedXMP\s*=\s*("[^"]*"|'[^']*')|<xmpNote:HasExtendedXMP>[^<]*</xmpNote:HasExtendedXMP>"""
)
"""The pointer to segments of their own, which are not kept."""

_EXIF_MARKER = b"Exif\0\0"

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
        ExifTags.Base.Rating,
        ExifTags.Base.RatingPercent,
        ExifTags.Base.XPTitle,
        ExifTags.Base.XPComment,
        ExifTags.Base.XPAuthor,
        ExifTags.Base.XPKeywords,
        ExifTags.Base.XPSubject,
        ExifTags.IFD.Exif,
        ExifTags.IFD.GPSInfo,
    }
)
"""A TIFF keeps its layout (strips, compression) beside its EXIF; only these tags hold for another file too."""

_GEOGRAPHIC_TIFF_TAGS = frozenset({33550, 33922, 34264, 34735})
"""Scale, tie points, transformation and keys of GeoTIFF."""

_LEAST_BEHIND_BYTES = 4096
"""Behind the end of a JPEG; many cameras leave some."""

SUB_DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


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
    lost: tuple[str, ...]
    """In words, what is none of these."""


def read_metadata(image: Image.Image, data: bytes) -> Metadata:
    """That of an image from `data`, the whole file; Pillow has loaded it, but for JPEG and TIFF."""
    notes = []
    for key, name in (("xmp", "XMP"), ("icc_profile", "the colour profile")):
        if not isinstance(image.info.get(key, b""), bytes):
            # Pillow looks for an orientation in XMP as well, and would fail here.
            del image.info[key]
            notes.append(f"{name} could not be read and was dropped")
    orientation, exif = None, None
    try:
        orientation = _stated_orientation(image.getexif())
        exif = _tiff_exif(image, notes) if image.format == "TIFF" else _stored_exif(image)
    except Exception:
        # Cameras and editors write all kinds of EXIF; the picture counts for more.
        notes.append("EXIF could not be read and was dropped")
    xmp = image.info.get("xmp") or None
    if xmp and _XMP_OF_MORE.search(xmp):
        notes.append("XMP was dropped: it speaks of a video or gain map behind the picture")
        xmp = None
    elif xmp:
        xmp, extended = _XMP_EXTENDED.subn(b"", xmp)
        if extended:
            notes.append("extended XMP was dropped")
        xmp = _XMP_THUMBNAILS.sub(b"", xmp)
    return Metadata(
        orientation=orientation,
        exif=exif,
        icc=image.info.get("icc_profile") or None,
        xmp=xmp,
        dpi=_dpi(image),
        png_colour=png_colour(data) if image.format == "PNG" else (),
        lossless_webp=image.format == "WEBP" and is_lossless_webp(data),
        lost=(*notes, *_lost_beside(image, data)),
    )


def _lost_beside(image: Image.Image, data: bytes) -> list[str]:
    """What a file has besides a picture in colour or grey, its alpha, and metadata."""
    notes = []
    if image.format in ("JPEG", "MPO") and (size := bytes_behind_jpeg(data)) >= _LEAST_BEHIND_BYTES:
        notes.append(
            f"{size:,} bytes behind the picture were dropped: a video, a gain map, further pictures or the like"
        )
    tags = tiff_tags(image)
    if (further := tags.get(ExifTags.Base.SamplesPerPixel, 1) - len(image.getbands())) > 0:
        notes.append(f"channels beside the colours were dropped: {further}")
    if _GEOGRAPHIC_TIFF_TAGS & set(tags):
        notes.append("the georeference (GeoTIFF) was dropped")
    return notes


def _stated_orientation(exif: Image.Exif) -> int | None:
    """The orientation (1..8) as stored."""
    value = exif.get(ExifTags.Base.Orientation)
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def lies(orientation: object) -> bool:
    """Whether the file's rows are the upright picture's columns."""
    return orientation in (5, 6, 7, 8)


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    """Pixels per inch along the file's rows and columns; None if it says nothing that could be."""
    if image.format == "TIFF" and not {ExifTags.Base.XResolution, ExifTags.Base.YResolution} <= set(tiff_tags(image)):
        return None  # where Pillow says 1
    try:
        across, down = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not (1 <= across <= _MOST_DPI and 1 <= down <= _MOST_DPI):
        return None
    return across, down


def _stored_exif(image: Image.Image) -> bytes | None:
    """The EXIF of a file other than TIFF, with the marker that JPEG wants before it."""
    stored = image.info.get("exif")
    if not stored and isinstance(text := image.info.get("Raw profile type exif"), str):
        stored = bytes.fromhex("".join(text.split("\n")[3:]))  # as ImageMagick writes it into a PNG
    return _without_thumbnail(stored) if stored else None


def _without_thumbnail(exif: bytes) -> bytes:
    """EXIF, with or without its marker: with it, and without the thumbnail, which would show the photograph unrestored.

    Nothing else changes, and nothing moves, since makers' notes may hold offsets of their own.
    """
    tiff = bytearray(exif.removeprefix(_EXIF_MARKER))
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    first = int.from_bytes(tiff[4:8], order)
    following = first + 2 + 12 * int.from_bytes(tiff[first : first + 2], order)
    if following + 4 <= len(tiff):
        tiff[following : following + 4] = bytes(4)
    return _EXIF_MARKER + bytes(tiff)


def _tiff_exif(image: Image.Image, notes: list[str]) -> bytes | None:
    """The EXIF among a TIFF's tags; adds a note where Pillow loses letters."""
    exif = image.getexif()
    for tag in set(exif) - _DESCRIPTIVE_TIFF_TAGS:
        del exif[tag]
    if not exif:
        return None
    exif.bigtiff = False  # of a BigTIFF; no other format holds such EXIF
    written = rewritable_exif(exif).tobytes()
    if any(
        isinstance(text, str) and not text.isascii() for tag in SUB_DIRECTORIES for text in exif.get_ifd(tag).values()
    ):
        notes.append("letters beyond ASCII in EXIF's details were replaced by ?")
    return _without_thumbnail(written)


def rewritable_exif(exif: Image.Exif | bytes) -> Image.Exif:
    """Tags whose text Pillow writes again letter by letter; as a string it would lose those beyond ASCII."""
    if isinstance(exif, bytes):
        stored, exif = exif, Image.Exif()
        exif.load(stored)
    for tag, value in exif.items():
        if isinstance(value, str):
            exif[tag] = value.encode("latin-1")  # as which Pillow reads any
    return exif
