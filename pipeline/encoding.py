"""Restored pixels in, image files out, with what the source had beside its pixels."""

import errno
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from pipeline.image_records import DecodedImage, EncodedImage, ImageFault, Pixels, as_stored, mean_channel, to_uint8
from pipeline.metadata import SUB_DIRECTORIES, rewritable_exif
from pipeline.png import encode_png
from pipeline.records import Stage

FORMATS_BY_OPTION = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_WRITES_SAME = frozenset({"JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"})
_WRITES_ALPHA = frozenset({"PNG", "WEBP", "TIFF"})
_WRITES_16_BITS = frozenset({"PNG", "TIFF", "PPM"})
_WRITES_METADATA = frozenset({"JPEG", "PNG", "WEBP", "TIFF"})
_JPEG_EXIF_BYTES = 65_533
_JPEG_XMP_BYTES = 65_504
_XMP_TIFF_TAG = 700
_LOSSLESS_EFFORT = 50
"""Of 100, which a lossless WebP's quality means."""
_OF_SRGB = {b"gAMA": (45455,), b"cHRM": (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)}
"""What these chunks of a PNG say of sRGB, in hundred-thousandths; a hundredth more or less is the same picture."""
_CICP_OF_SRGB = b"\x01\x0d"
"""Its primaries and transfer function in ITU-T H.273."""


def encoded_format(source_format: str, option: str) -> str:
    """The format (Pillow's name) that `--format` leads to: `same` is PNG where the source's cannot be written.

    Raises ValueError for an unknown option.
    """
    if option == "same":
        return source_format if source_format in _WRITES_SAME else "PNG"
    if option not in FORMATS_BY_OPTION:
        raise ValueError(f"unknown format {option!r}; choose same, {', '.join(FORMATS_BY_OPTION)}")
    return FORMATS_BY_OPTION[option]


def encode(source: DecodedImage, pixels: Pixels, *, format: str, quality: int) -> EncodedImage:
    """A file of restored pixels with what `source` had beside them: alpha, greyscale, depth, EXIF, XMP, ICC, DPI.

    What the format cannot hold is named in the warnings: JPEG has no alpha (composed over white); JPEG, WebP
    and BMP have eight bits; Pillow writes 16 bits for greyscale without alpha only. WebP holds greyscale
    in three equal channels. What alpha hides altogether keeps its colours, but in a lossy WebP, whose encoder puts its
    own there. Rows are stored as the source's are, and the file states the same orientation: places in pixels that were
    noted of the source, such as boxes around what it shows, hold for the result.

    Args:
        source: the decoded image that was restored.
        pixels: H x W x 3, same shape and dtype as `source.pixels`.
        format: `same`, `png`, `jpeg` or `webp`.
        quality: 1..100, for JPEG (written 4:4:4) and WebP.

    Raises:
        ImageFault: the codec refuses the image, for instance WebP beyond 16,383 pixels a side.
        ValueError: shapes or dtypes differ, or the format is unknown.
    """
    if pixels.shape != source.pixels.shape or pixels.dtype != source.pixels.dtype:
        raise ValueError(
            f"restored pixels are {pixels.shape} {pixels.dtype}, "
            f"the source is {source.pixels.shape} {source.pixels.dtype}"
        )
    name = encoded_format(source.source_format, format)
    channels, notes = _compose(source, pixels, name)
    channels = as_stored(channels, source.exif_orientation)
    height, width = channels.shape[:2]
    if format == "same" and name != source.source_format:
        notes.append(f"{source.source_format} was written as {name}")
    options = _save_options(source, name, quality, notes)
    if format == "same" and source.lossless_webp:
        options |= {"lossless": True, "exact": True, "quality": _LOSSLESS_EFFORT}
    try:
        data = encode_png(channels, options) if name == "PNG" else _saved(channels, name, options)
        with Image.open(io.BytesIO(data), formats=[name]) as written:
            mode = written.mode  # WebP drops alpha that hides nothing, for one
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.ENOSPC):
            raise MemoryError(str(error)) from error
        fault = f"{name} cannot hold this {width} x {height} image: {error}"
        raise ImageFault(Stage.ENCODE, "not_encodable", fault) from error
    return EncodedImage(data, name, mode, width, height, (*source.lost, *notes))


def _saved(channels: Pixels, name: str, options: dict[str, object]) -> bytes:
    with _file() if name == "JPEG" else io.BytesIO() as file:
        Image.fromarray(channels).save(file, name, **options)
        file.seek(0)
        return file.read()


def _file() -> BinaryIO:
    """A file in memory, into which Pillow encodes JPEG without the GIL, which a worker's other threads wait for.

    Where the system has none it is a buffer, for which Pillow keeps the GIL.
    """
    with suppress(AttributeError, OSError):
        return open(os.memfd_create("encoded"), "w+b")
    return io.BytesIO()


def _compose(source: DecodedImage, pixels: Pixels, name: str) -> tuple[Pixels, list[str]]:
    """Channels that `name` can hold, H x W or H x W x C, and notes on what it could not."""
    notes: list[str] = []
    alpha = source.alpha
    if alpha is not None and not alpha.all():
        pixels = np.where(alpha[:, :, None] == 0, source.pixels, pixels)
    if pixels.dtype == np.uint16 and (name not in _WRITES_16_BITS or not source.greyscale or alpha is not None):
        beside = " beside alpha" if alpha is not None else ""
        notes.append(f"16 bits were reduced to 8: {name} is not written deeper{beside}")
        pixels = to_uint8(pixels)
        alpha = None if alpha is None else to_uint8(alpha)
    channels = mean_channel(pixels) if source.greyscale else pixels
    if name == "WEBP" and channels.ndim == 2:
        channels = cast(Pixels, np.repeat(channels[:, :, None], 3, axis=2))
    if alpha is not None and name not in _WRITES_ALPHA:
        notes.append(f"{name} has no alpha: composed over white")
        channels, alpha = over_white(channels, alpha), None
    if alpha is not None:
        channels = cast(Pixels, np.dstack([channels, alpha]))
    return cast(Pixels, np.ascontiguousarray(channels)), notes


def over_white(channels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 channels (H x W or H x W x 3) as they look on a white page."""
    weight = alpha.astype(np.float32) / 255
    if channels.ndim == 3:
        weight = weight[:, :, None]
    return np.rint(channels * weight + 255 * (1 - weight)).astype(np.uint8)


def _save_options(source: DecodedImage, name: str, quality: int, notes: list[str]) -> dict[str, object]:
    """Pillow's keyword arguments for saving; adds a note for metadata that does not fit."""
    options: dict[str, object] = {}
    exif = rewritable_exif(source.exif) if name == "TIFF" and source.exif is not None else source.exif
    match name:
        case "JPEG":
            options |= {"quality": quality, "subsampling": 0}
        case "WEBP":
            options |= {"quality": quality, "method": 4}
        case "TIFF" if not (isinstance(exif, Image.Exif) and set(SUB_DIRECTORIES) & set(exif)):
            # libtiff, which compresses, cannot write the directories of a camera's EXIF.
            options["compression"] = "tiff_adobe_deflate"
    if name in _WRITES_METADATA:
        if name == "PNG":
            chunks = PngImagePlugin.PngInfo()
            for kind, content in source.png_colour:
                chunks.add(kind, content)
            options["pnginfo"] = chunks
        if source.icc is not None and name == "WEBP" and source.icc[16:20] == b"GRAY":
            notes.append("the colour profile was dropped: it is for greyscale, which WebP does not hold")
        elif source.icc is not None:
            options["icc_profile"] = source.icc
        if name == "JPEG" and len(source.exif or b"") > _JPEG_EXIF_BYTES:
            notes.append("EXIF was dropped: it is larger than JPEG can hold")
        elif exif is not None:
            options["exif"] = exif
        if source.xmp is not None:
            if name == "JPEG" and len(source.xmp) > _JPEG_XMP_BYTES:
                notes.append("XMP was dropped: it is larger than JPEG can hold")
            elif name == "PNG" and source.xmp.decode(errors="ignore").encode() != source.xmp:
                notes.append("XMP was dropped: it is not UTF-8, as PNG holds it")
            else:
                _add_xmp(options, name, source.xmp)
    if source.exif_orientation not in (None, 1):
        _state_orientation(options, source.exif_orientation)
    if source.dpi is not None:
        options["dpi"] = source.dpi
    if name != "PNG" and _means_another_colour(dict(source.png_colour), has_profile=source.icc is not None):
        kinds = ", ".join(kind.decode() for kind, _ in source.png_colour)
        notes.append(f"what the PNG says of its colours beside a profile ({kinds}) was dropped")
    return options


def _state_orientation(options: dict[str, object], orientation: int | None) -> None:
    """Puts it into EXIF that lacks it: what said it, XMP or other EXIF, may have been dropped."""
    exif = rewritable_exif(cast(Image.Exif | bytes, options.get("exif", b"")))
    if ExifTags.Base.Orientation not in exif:
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif


def _means_another_colour(chunks: Mapping[bytes, bytes], *, has_profile: bool) -> bool:
    """Whether a reader without these chunks would show another picture; the first one counts, as PNG has it."""
    if b"cICP" in chunks:
        return chunks[b"cICP"][:2] != _CICP_OF_SRGB
    if has_profile or b"sRGB" in chunks:
        return False
    return any(_differs(chunks[kind], expected) for kind, expected in _OF_SRGB.items() if kind in chunks)


def _differs(content: bytes, expected: Sequence[int]) -> bool:
    values = [int.from_bytes(content[place : place + 4], "big") for place in range(0, len(content), 4)]
    return len(values) != len(expected) or any(abs(a - b) > 1000 for a, b in zip(values, expected, strict=True))


def _add_xmp(options: dict[str, object], name: str, xmp: bytes) -> None:
    match name:
        case "PNG":
            cast(PngImagePlugin.PngInfo, options["pnginfo"]).add_itxt("XML:com.adobe.xmp", xmp)
        case "TIFF":
            cast(Image.Exif, options.setdefault("exif", Image.Exif()))[_XMP_TIFF_TAG] = xmp
        case _:
            options["xmp"] = xmp
