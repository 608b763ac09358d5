"""What the classifier sees of a photograph: several crops of native pixels and one thumbnail.

Noise, blur and rain live in the finest pixels, haze and low light in the whole picture (a resized image
alone has lost the first, a crop alone the second).
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

CANDIDATES_PER_SIDE = 8
"""At most this many rows and columns of places are considered for crops, so that the cost is bounded."""

FLATTEST_QUANTILE = 0.1
"""Crops span the ranks of local contrast from the strongest down to here: below lie saturated skies and black."""


@dataclass(frozen=True)
class ViewSettings:
    """Sizes in pixels and the number of crops; stored with the weights, which fit one setting only."""

    crop_px: int = 96
    crops: int = 4
    thumbnail_px: int = 96

    def __post_init__(self) -> None:
        if min(self.crop_px, self.crops, self.thumbnail_px) < 1:
            raise ValueError(f"sizes and number of crops must be at least 1: {self}")


@dataclass(frozen=True)
class Views:
    """`crops` is N x P x P x 3, `thumbnail` T x T x 3; both uint8 RGB. N is 1 where all crops would be the same."""

    crops: NDArray[np.uint8]
    thumbnail: NDArray[np.uint8]
    small: bool = False
    """A side of the image is shorter than a crop, so that crops are mirrored and the thumbnail may be enlarged."""


def _starts(length: int, window: int) -> NDArray[np.intp]:
    """Evenly spread first pixels of windows that together cover a side, as far as the limit allows."""
    count = min(CANDIDATES_PER_SIDE, -(-length // window))
    return np.rint(np.linspace(0, length - window, count)).astype(np.intp)


def _contrasts(
    image: NDArray[np.uint8], tops: NDArray[np.intp], lefts: NDArray[np.intp], px: int
) -> NDArray[np.float64]:
    """Mean absolute difference of neighbours in the green channel, on every fourth row, of each window."""
    # All windows in few calls: threads that look at images at once wait for each other between calls.
    rows = image[tops[:, None] + np.arange(0, px, 4), :, 1].astype(np.int16)
    change = np.abs(rows[:, :, 1:] - rows[:, :, :-1]).sum(axis=1, dtype=np.int32)
    upto = np.zeros((len(tops), image.shape[1]), np.int64)
    np.cumsum(change, axis=1, out=upto[:, 1:])
    found = (upto[:, lefts + px - 1] - upto[:, lefts]) / max(1, rows.shape[1] * (px - 1))
    return cast(NDArray[np.float64], found.ravel())


def native_crops(image: NDArray[np.uint8], settings: ViewSettings) -> NDArray[np.uint8]:
    """Crops of native pixels, N x P x P x 3, from the most textured place to an almost flat one.

    The choice depends on the pixels alone. An image smaller than a crop is mirrored up; one no larger than a crop gives
    one, another one with fewer places than crops some of them twice.
    """
    px = settings.crop_px
    height, width = image.shape[:2]
    if height < px or width < px:
        image = np.pad(image, ((0, max(0, px - height)), (0, max(0, px - width)), (0, 0)), mode="symmetric")
    if image.shape[:2] == (px, px):
        return image[None]
    tops, lefts = _starts(image.shape[0], px), _starts(image.shape[1], px)
    order = np.argsort(_contrasts(image, tops, lefts, px), kind="stable")
    ranks = np.rint(np.linspace(1, FLATTEST_QUANTILE, settings.crops) * (len(order) - 1)).astype(int)
    places = [divmod(place, len(lefts)) for place in order[ranks]]
    return np.stack([image[tops[row] : tops[row] + px, lefts[column] : lefts[column] + px] for row, column in places])


def thumbnail(image: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """The whole image squeezed into a square, side_px x side_px x 3, by a linear filter that averages."""
    # torch reads the pixels where they are and uses vectors, so that it needs a fifth of Pillow's time.
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    small = F.interpolate(pixels, (side_px, side_px), mode="bilinear", antialias=True)
    return cast(NDArray[np.uint8], small[0].permute(1, 2, 0).numpy())


def take_views(image: NDArray[np.uint8], settings: ViewSettings) -> Views:
    """The views of one H x W x 3 uint8 RGB image of any size from 1 x 1 up.

    Raises:
        ValueError: this is no array, or one of another shape or type.
    """
    if not isinstance(image, np.ndarray):
        raise ValueError(f"expected a NumPy array, found {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected an H x W x 3 uint8 image, found {image.shape} {image.dtype}")
    small = min(image.shape[:2]) < settings.crop_px
    return Views(native_crops(image, settings), thumbnail(image, settings.thumbnail_px), small)
