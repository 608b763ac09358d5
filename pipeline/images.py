"""Image files in, upright pixels out, and back: everything that knows about codecs, modes and EXIF.

All functions are pure and may run in many threads at once; Pillow's codecs release the GIL.
"""

import io
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from pipeline.records import Stage

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

READ_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
"""Pillow's names of what is decoded; other formats are refused, whatever Pillow has a plugin for."""

_BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "BMP": (b"BM",),
    "GIF": (b"GIF8",),
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


class ImageFault(Exception):
    """What is wrong with one image: it becomes a `failed` row and the run goes on.

    The message is for people; `error_class` is for queries: `missing`, `permission_denied`, `unreadable`,
    `empty_file`, `truncated`, `not_an_image`, `zero_size`, `too_many_pixels`, `unsupported_mode`,
    `not_encodable`.
    """

    def __init__(self, stage: Stage, error_class: str, message: str) -> None:
        super().__init__(stage, error_class, message)
        self.stage = stage
        self.error_class = error_class
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Header:
    """What a file says of itself before any pixel is decoded; sides in pixels, as stored."""

    format: str
    mode: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An upright image with all that its file knew.

    `pixels` is H x W x 3 RGB, uint8 or uint16 (greyscale replicated to three channels); `alpha` is H x W of
    the same dtype, or None. `mode` and `bit_depth` (bits per channel) are those of the file, which may be
    deeper than `pixels`: a warning then says so. `exif` has its orientation set to 1; `icc` describes `pixels`.
    """

    pixels: Pixels
    alpha: Pixels | None
    greyscale: bool
    source_format: str
    mode: str
    bit_depth: int
    exif_orientation: int | None
    exif: bytes | None
    icc: bytes | None
    warnings: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]


@dataclass(frozen=True)
class _Layout:
    """Metadata read before the pixels are."""

    bit_depth: int
    greyscale: bool
    orientation: int | None
    exif: bytes | None
    warnings: tuple[str, ...]


def to_uint8(pixels: Pixels) -> NDArray[np.uint8]:
    """The same picture in eight bits: uint8 as it is, uint16 (0..65535) rounded to 0..255."""
    if pixels.dtype == np.uint8:
        return cast(NDArray[np.uint8], pixels)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_header(file: BinaryIO) -> Header:
    """Format, mode and size of an image file, at the cost of its first bytes; raises `ImageFault`."""
    beginning = file.read(16)
    if not beginning:
        raise _fault("empty_file", "the file is empty (0 bytes)")
    file.seek(0)
    with _open(file, beginning) as image:
        return Header(image.format or "", image.mode, image.width, image.height)


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
    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < max_pixels:
        # Pillow has one limit for the whole process and warns above it; `max_pixels` decides here.
        Image.MAX_IMAGE_PIXELS = max_pixels
    with _open(io.BytesIO(data), data[:16]) as image:
        if image.width * image.height > max_pixels:
            raise _fault(
                "too_many_pixels",
                f"the image is {image.width} x {image.height} = {image.width * image.height:,} pixels; "
                f"the limit is {max_pixels:,}",
            )
        # Codecs raise nearly any exception on bytes that are not what they should be.
        try:
            stored = _stored_bit_depth(image)
            layout = _read_layout(image, *stored)
            image.load()
            _check_complete(image, data)
            decoded = _to_decoded(image, layout)
        except ImageFault:
            raise
        except Exception as error:
            raise _decoding_fault(error, data, image.format or "image") from error
    return decoded


def _fault(error_class: str, message: str) -> ImageFault:
    return ImageFault(Stage.DECODE, error_class, message)


def _open(file: BinaryIO, beginning: bytes) -> Image.Image:
    """A lazily read Pillow image with a known format and sides of at least one pixel."""
    try:
        image = Image.open(file, formats=READ_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _fault("too_many_pixels", f"refused as a possible decompression bomb: {error}") from error
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
    if image.width < 1 or image.height < 1:
        raise _fault("zero_size", f"the image is {image.width} x {image.height}: it has no pixels")
    return image


def _format_by_beginning(beginning: bytes) -> str | None:
    return next((name for name, starts in _BEGINNINGS.items() if beginning.startswith(starts)), None)


def _is_cut_short(data: bytes, name: str) -> bool:
    """Whether a file of the format lacks the end that its beginning promises."""
    match name:
        case "JPEG" | "MPO":
            return b"\xff\xd9" not in data
        case "PNG":
            return b"IEND" not in data[-4096:]
        case "WEBP":
            return len(data) < 12 or len(data) < int.from_bytes(data[4:8], "little") + 8
        case "BMP":
            return len(data) < 54 or len(data) < int.from_bytes(data[2:6], "little")
        case "GIF":
            return not data.rstrip(b"\0").endswith(b";")
    return False


def _decoding_fault(error: Exception, data: bytes, name: str) -> ImageFault:
    """An exception of a decoder in plain words."""
    text = str(error).lower()
    if isinstance(error, EOFError) or "truncated" in text or _is_cut_short(data, name):
        return _fault("truncated", f"the {name} file is cut short: it ends after {len(data):,} bytes, before its image")
    if "size" in text and "zero" in text:
        return _fault("zero_size", f"the {name} file states an image without pixels")
    if isinstance(error, UnidentifiedImageError):
        return _fault("unreadable", f"the file begins like a {name} file, but its header is damaged")
    return _fault("unreadable", f"the {name} file is damaged and cannot be decoded: {error or type(error).__name__}")


def _check_complete(image: Image.Image, data: bytes) -> None:
    """Refuses files of which decoders make do with a part."""
    if image.format in ("JPEG", "MPO") and _is_cut_short(data, "JPEG"):
        raise _fault("truncated", f"the JPEG file is cut short: it has no end marker in its {len(data):,} bytes")
    if image.format == "WEBP" and _is_cut_short(data, "WEBP"):
        raise _fault("truncated", f"the WEBP file is cut short: it ends after {len(data):,} bytes")


# Metadata


def _stored_bit_depth(image: Image.Image) -> tuple[int, bool]:
    """Bits per channel in the file, and whether it is greyscale though Pillow reads it as colour."""
    raw_mode = ""
    if image.format == "PNG" and image.tile:  # type: ignore[attr-defined]
        raw_mode = str(image.tile[0].args)  # type: ignore[attr-defined]
    bits = getattr(image, "tag_v2", {}).get(258)
    if bits:
        return int(bits[0] if isinstance(bits, tuple) else bits), False
    if ";16" in raw_mode or image.mode.startswith("I"):
        return 16, raw_mode.startswith("LA")
    return {"1": 1, "F": 32}.get(image.mode, 8), False


def _read_layout(image: Image.Image, bit_depth: int, grey_in_colour: bool) -> _Layout:
    notes = []
    if bit_depth > 8 and not image.mode.startswith(("I", "F")):
        notes.append(f"{bit_depth}-bit {'greyscale with alpha' if grey_in_colour else 'colour'} was read as 8 bits")
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"first of {image.n_frames} frames")  # type: ignore[attr-defined]
    orientation, exif = None, None
    try:
        orientation, exif = _upright_exif(image)
    except Exception:
        # Cameras and editors write all kinds of EXIF; the picture counts for more.
        notes.append("EXIF could not be read and was dropped")
    grey = grey_in_colour or image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    return _Layout(bit_depth, grey, orientation, exif, tuple(notes))


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
        return orientation, cast(bytes | None, image.info.get("exif"))
    if not exif:
        return orientation, None
    kept = Image.Exif()
    kept.load(exif.tobytes())
    if value is not None:
        kept[ExifTags.Base.Orientation] = 1
    return orientation, kept.tobytes()


# Pixels


def _to_decoded(image: Image.Image, layout: _Layout) -> DecodedImage:
    """Turns a loaded Pillow image upright and into arrays."""
    mode, source_format = image.mode, image.format or ""
    notes = list(layout.warnings)
    icc = cast(bytes | None, image.info.get("icc_profile")) or None
    transparency = image.info.get("transparency")
    # Pillow turns TIFF upright while it loads; every other format is left to its reader.
    if layout.orientation in _UPRIGHT and source_format != "TIFF":
        image = image.transpose(_UPRIGHT[layout.orientation])
    greyscale = layout.greyscale
    alpha: Pixels | None = None
    if mode in ("I", "F") or mode.startswith("I;16"):
        grey, note = _deep_grey(image)
        if note:
            notes.append(note)
        if isinstance(transparency, int) and mode != "F":
            alpha = np.where(grey == transparency, 0, 65535).astype(np.uint16)
        pixels: Pixels = _replicated(grey)
    else:
        if mode == "CMYK":
            image, note = _cmyk_to_rgb(image, icc)
            icc = None
            notes.append(note)
        if image.has_transparency_data:
            colour_alpha = np.asarray(image.convert("RGBA"))
            pixels, alpha = colour_alpha[:, :, :3].copy(), colour_alpha[:, :, 3].copy()
        else:
            pixels = np.array(_to_rgb(image))
        if mode in ("P", "PA"):
            first = pixels[:, :, :1]
            greyscale = bool((pixels == first).all())
    return DecodedImage(
        pixels=pixels,
        alpha=alpha,
        greyscale=greyscale,
        source_format="JPEG" if source_format == "MPO" else source_format,
        mode=mode,
        bit_depth=layout.bit_depth,
        exif_orientation=layout.orientation,
        exif=layout.exif,
        icc=icc,
        warnings=tuple(notes),
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise _fault("unsupported_mode", f"channels of mode {image.mode} cannot be read as RGB") from error


def _replicated(grey: NDArray[np.uint16]) -> NDArray[np.uint16]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _deep_grey(image: Image.Image) -> tuple[NDArray[np.uint16], str | None]:
    """One channel of more than eight bits, H x W uint16, and a note where it had to be scaled."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise _fault("unsupported_mode", "floating-point values beyond 0..1 have no known white level")
        return np.rint(values * 65535).astype(np.uint16), "floating-point greyscale was read as 16 bits"
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise _fault("unsupported_mode", "32-bit integers beyond 0..65535 have no known white level")
    return values.astype(np.uint16), None


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, str]:
    """CMYK as sRGB by its own profile, or by plain subtraction where it has none; and a note on which."""
    if icc is not None:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(icc)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
        except (ImageCms.PyCMSError, OSError):
            return image.convert("RGB"), "CMYK was converted to RGB without its colour profile, which is damaged"
        if converted is not None:
            return converted, "CMYK was converted to sRGB by its colour profile"
    return image.convert("RGB"), "CMYK was converted to RGB without a colour profile"


# Encoding


@dataclass(frozen=True)
class EncodedImage:
    """A whole image file in memory; sides in pixels, `format` and `mode` in Pillow's names."""

    data: bytes
    format: str
    mode: str
    width: int
    height: int
    warnings: tuple[str, ...] = ()


FORMATS_BY_OPTION = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_WRITES_SAME = frozenset({"JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"})
_WRITES_ALPHA = frozenset({"PNG", "WEBP", "TIFF"})
_WRITES_16_BITS = frozenset({"PNG", "TIFF"})
_WRITES_METADATA = frozenset({"JPEG", "PNG", "WEBP", "TIFF"})
_JPEG_EXIF_BYTES = 65_533


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
    """A file of restored pixels with what `source` had beside them: alpha, greyscale, depth, EXIF, ICC.

    What the format cannot hold is named in the warnings: JPEG has no alpha (composed over white); JPEG, WebP
    and BMP have eight bits; Pillow writes 16 bits for greyscale without alpha only.

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
            f"restored pixels are {pixels.shape} {pixels.dtype}, the source is {source.pixels.shape} {source.pixels.dtype}"
        )
    name = encoded_format(source.source_format, format)
    image, notes = _compose(source, pixels, name)
    if format == "same" and name != source.source_format:
        notes.append(f"{source.source_format} was written as {name}")
    options = _save_options(source, name, quality, notes)
    buffer = io.BytesIO()
    try:
        image.save(buffer, name, **options)
    except (OSError, ValueError, RuntimeError) as error:
        size = f"{image.width} x {image.height}"
        raise ImageFault(Stage.ENCODE, "not_encodable", f"{name} cannot hold this {size} image: {error}") from error
    return EncodedImage(buffer.getvalue(), name, image.mode, image.width, image.height, tuple(notes))


def _compose(source: DecodedImage, pixels: Pixels, name: str) -> tuple[Image.Image, list[str]]:
    """The Pillow image that `name` can hold, and notes on what it could not."""
    notes: list[str] = []
    alpha = source.alpha
    deep = pixels.dtype == np.uint16
    if deep and (name not in _WRITES_16_BITS or not source.greyscale or alpha is not None):
        notes.append(
            f"16 bits were reduced to 8: {name} is not written with 16 bits" + (" and alpha" * (alpha is not None))
        )
        pixels, deep = to_uint8(pixels), False
        alpha = None if alpha is None else to_uint8(alpha)
    channels = _mean_channel(pixels) if source.greyscale else pixels
    if alpha is not None and name not in _WRITES_ALPHA:
        notes.append(f"{name} has no alpha: composed over white")
        channels, alpha = _over_white(channels, alpha), None
    if alpha is not None:
        channels = np.dstack([channels, alpha])
    return Image.fromarray(np.ascontiguousarray(channels)), notes


def _mean_channel(pixels: Pixels) -> Pixels:
    """H x W mean of three channels, rounded; of a replicated channel, that channel exactly."""
    return cast(Pixels, ((pixels.sum(axis=2, dtype=np.uint32) + 1) // 3).astype(pixels.dtype))


def _over_white(channels: Pixels, alpha: Pixels) -> Pixels:
    """uint8 channels (H x W or H x W x 3) as they look on a white page."""
    weight = alpha.astype(np.float32) / 255
    if channels.ndim == 3:
        weight = weight[:, :, None]
    return np.rint(channels * weight + 255 * (1 - weight)).astype(np.uint8)


def _save_options(source: DecodedImage, name: str, quality: int, notes: list[str]) -> dict[str, object]:
    """Pillow's keyword arguments for saving; adds a note for metadata that does not fit."""
    options: dict[str, object] = {}
    match name:
        case "PNG":
            options["compress_level"] = 4
        case "JPEG":
            options |= {"quality": quality, "subsampling": 0}
        case "WEBP":
            options |= {"quality": quality, "method": 4}
        case "TIFF":
            options["compression"] = "tiff_adobe_deflate"
    if name in _WRITES_METADATA:
        if source.icc is not None:
            options["icc_profile"] = source.icc
        if source.exif is not None:
            if name == "JPEG" and len(source.exif) > _JPEG_EXIF_BYTES:
                notes.append("EXIF was dropped: it is larger than JPEG can hold")
            else:
                options["exif"] = source.exif
    return options
