"""How a TIFF stores its pixels, where Pillow does not know or is mistaken."""

import io
import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

_OF_FILE_ORDER = re.compile(r"(;(?:16|32|64))B([SF]?)$")
"""The end of Pillow's name of big-endian pixels; with N for B it is this machine's order."""

_SUBSAMPLING, _SAMPLE_FORMAT = 530, 339
_SIGNED, _YCBCR = 2, 6

OF_WEBP = "compression 50001"
"""In what `stated_channels` says of a TIFF whose pixels are WebP, which the libtiff in Pillow's wheels cannot read."""


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Those of the page that is open; none of another format."""
    return cast(Mapping[int, Any], getattr(image, "tag_v2", {}))


def is_signed(image: Image.Image) -> bool:
    """Whether a TIFF says that its numbers have a sign."""
    return bool(_first(tiff_tags(image).get(_SAMPLE_FORMAT, 1)) == _SIGNED)


def is_misread(image: Image.Image) -> bool:
    """Whether a TIFF that is not loaded yet is of a kind that Pillow takes for another.

    It takes signed bytes for unsigned ones, reads uncompressed YCbCr as if each pixel had a colour of its own (before
    version 13 as RGB with a fourth byte), and does not find the alpha of greyscale that is stored in planes and
    compressed, so that all is transparent.
    """
    tags = tiff_tags(image)
    codecs = {tile.codec_name for tile in cast(TiffImagePlugin.TiffImageFile, image).tile}
    is_planar = tags.get(ExifTags.Base.PlanarConfiguration) == 2
    return (
        (image.mode == "L" and is_signed(image))
        or (image.mode in ("LA", "La") and is_planar and "libtiff" in codecs)
        or (_is_ycbcr(tags) and "raw" in codecs and (image.mode == "RGB" or _is_subsampled(tags)))
    )


def _is_ycbcr(tags: Mapping[int, Any]) -> bool:
    return bool(tags.get(ExifTags.Base.PhotometricInterpretation) == _YCBCR)


def _is_subsampled(tags: Mapping[int, Any]) -> bool:
    """Whether colours are stored at a smaller size than brightness; where no tag says so, bytes tell."""
    if not _is_ycbcr(tags):
        return False
    if _SUBSAMPLING in tags:
        return bool(tags[_SUBSAMPLING] != (1, 1))
    stored = sum(tags.get(TiffImagePlugin.TILEBYTECOUNTS) or tags.get(ExifTags.Base.StripByteCounts, ()))
    return bool(stored < 3 * tags[ExifTags.Base.ImageWidth] * tags[ExifTags.Base.ImageLength])


def _first(value: Any) -> Any:
    """Of what Pillow gives as a tuple if there are several."""
    return value[0] if isinstance(value, tuple) and value else value


def mend_storage(image: Image.Image, bit_depth: int) -> None:
    """Corrects what Pillow tells its codecs of how a TIFF stores its pixels, where that is wrong.

    It takes planes of 16 bits, uncompressed, for planes of bytes, and a single plane for one of plain bytes; and it
    takes what libtiff has decompressed, which is in this machine's order, for the file's order in all modes but two.
    """
    tiff = cast(TiffImagePlugin.TiffImageFile, image)
    is_planar = tiff.tag_v2.get(ExifTags.Base.PlanarConfiguration) == 2
    if is_planar and tiff.tag_v2.get(ExifTags.Base.SamplesPerPixel, 1) == 1:
        tiff.tag_v2[ExifTags.Base.PlanarConfiguration] = 1
        tiff.tile = []
        tiff._setup()
        is_planar = False
    for place, tile in enumerate(tiff.tile):
        raw_mode, *others = cast(tuple[Any, ...], tile.args)
        if tile.codec_name == "raw" and is_planar and bit_depth == 16 and ";" not in raw_mode:
            raw_mode += ";16B" if tiff.tag_v2.prefix == b"MM" else ";16L"
        elif tile.codec_name == "libtiff":
            raw_mode = _OF_FILE_ORDER.sub(r"\1N\2", raw_mode)
        tiff.tile[place] = tile._replace(args=(raw_mode, *others))


def stated_channels(data: bytes) -> str | None:
    """What a TIFF says of its channels; None if its header is not whole."""
    try:
        is_big = data[:4] in (b"II+\0", b"MM\0+")
        # Pillow knows a BigTIFF by its number in little-endian order alone.
        header = b"II+\0" + data[4:16] if is_big else data[:8]
        tags = TiffImagePlugin.ImageFileDirectory_v2(header, prefix=data[:2])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits = [int(each) for each in np.atleast_1d(tags[ExifTags.Base.BitsPerSample])]
        has_place = ExifTags.Base.StripOffsets in tags or ExifTags.Base.TileOffsets in tags
        sides = int(tags[ExifTags.Base.ImageWidth]) * int(tags[ExifTags.Base.ImageLength])
        photometric = int(tags.get(ExifTags.Base.PhotometricInterpretation, 0))
        subsampled = ", subsampled" if _is_subsampled(tags) else ""
    except Exception:
        return None
    if not has_place or sides <= 0:
        return None
    numbers = {_SIGNED: " signed", 3: " floating-point"}.get(_first(tags.get(_SAMPLE_FORMAT, 1)), "")
    planes = ", plane by plane" if tags.get(ExifTags.Base.PlanarConfiguration) == 2 else ""
    order = ("big-endian" if data.startswith(b"MM") else "little-endian") + (", BigTIFF" if is_big else "")
    compression = tags.get(ExifTags.Base.Compression, 1)
    how = f"{order}, photometric interpretation {photometric}" + (
        f", compression {compression}" if compression != 1 else ""
    )
    depth = "/".join(map(str, dict.fromkeys(bits)))
    count = tags.get(ExifTags.Base.SamplesPerPixel, 1)
    return f"{count} x {depth}{numbers} bits{planes}{subsampled} ({how})"
