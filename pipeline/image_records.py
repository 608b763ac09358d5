"""What decoding and encoding hand on: images as records, and what may be wrong with one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Stage
from pipeline.transparency import completed

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


class ImageFault(Exception):  # noqa: N818 - a fault of one image, not of the program
    """What is wrong with one image: it becomes a `failed` row and the run goes on.

    The message is for people; `error_class` is for queries, and `docs/manifest.md` says which there are.
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
    deeper than `pixels`: a warning then says so. `icc` describes `pixels`. All else is as stored: `exif` and `xmp` with
    the orientation in which the file's rows are, `dpi` along them and across, pixels per inch.
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
    xmp: bytes | None
    dpi: tuple[float, float] | None
    png_colour: tuple[tuple[bytes, bytes], ...] = ()
    """Kind and content of the chunks by which a PNG says, beside a profile, what its numbers mean."""
    lossless_webp: bool = False
    warnings: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    """Warnings of what a restored file will not have, which do not hold for one that is kept."""

    @cached_property
    def visible(self) -> Pixels:
        """The picture that classifier and restorer see: `pixels`, but for what alpha hides altogether."""
        return self.pixels if self.alpha is None else cast(Pixels, completed(self.pixels, self.alpha))

    @property
    def height(self) -> int:
        """Rows of the upright image."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of the upright image."""
        return int(self.pixels.shape[1])


@dataclass(frozen=True)
class EncodedImage:
    """A whole image file in memory; sides in pixels, `format` and `mode` in Pillow's names."""

    data: bytes
    format: str
    mode: str
    width: int
    height: int
    warnings: tuple[str, ...] = ()


_TURNED: dict[int | None, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
"""What turns pixels of each EXIF orientation upright; 1 already are."""


def upright(pixels: Pixels, orientation: int | None) -> Pixels:
    """Pixels, H x W or H x W x C, that are stored in an EXIF orientation, as they are to be seen."""
    turn = _TURNED.get(orientation)
    return pixels if turn is None else cast(Pixels, np.ascontiguousarray(turn(pixels)))


def as_stored(pixels: Pixels, orientation: int | None) -> Pixels:
    """What `upright` undoes; the quarter turns are each other's inverse, the rest their own."""
    return upright(pixels, {6: 8, 8: 6}.get(orientation or 1, orientation))


def to_uint8(pixels: Pixels) -> NDArray[np.uint8]:
    """The same picture in eight bits: uint8 as it is, uint16 (0..65535) rounded to 0..255."""
    if pixels.dtype == np.uint8:
        return cast(NDArray[np.uint8], pixels)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def mean_channel(pixels: Pixels) -> Pixels:
    """H x W mean of three channels, rounded; of a replicated channel, that channel exactly."""
    return cast(Pixels, ((pixels.sum(axis=2, dtype=np.uint32) + 1) // 3).astype(pixels.dtype))


def as_grey_as(source: NDArray[Any], result: NDArray[Any]) -> NDArray[Any]:
    """The result, H x W x 3, without the traces of colour that the network leaves in a picture that has none.

    Of grey in a lossy WebP the decoder takes a level of green away here and there.
    """
    for part in (source[::16, ::16], source):  # a picture in colour mostly shows it in few pixels
        red, green, blue = (part[:, :, channel] for channel in range(3))
        if not ((red == blue) & (red - green <= 1)).all():  # unsigned: more green than red is far above 1
            return result
    return np.repeat(mean_channel(result)[:, :, None], 3, axis=2)
