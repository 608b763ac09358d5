"""What the classifier sees of a photograph: several crops of native pixels and one thumbnail.

Noise, blur and rain live in the finest pixels, haze and low light in the whole picture (a resized image
alone has lost the first, a crop alone the second).
"""

from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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

    def as_dict(self) -> dict[str, int]:
        """The settings as JSON-ready keyword arguments of `ViewSettings`."""
        return asdict(self)


@dataclass(frozen=True)
class Views:
    """`crops` is N x P x P x 3, `thumbnail` T x T x 3; both uint8 RGB."""

    crops: NDArray[np.uint8]
    thumbnail: NDArray[np.uint8]


def _starts(length: int, window: int) -> NDArray[np.intp]:
    """Evenly spread first pixels of windows that together cover a side, as far as the limit allows."""
    count = min(CANDIDATES_PER_SIDE, -(-length // window))
    return np.rint(np.linspace(0, length - window, count)).astype(np.intp)


def _contrast(tile: NDArray[np.uint8]) -> float:
    """Mean absolute difference of neighbours in the green channel, on every fourth row."""
    green = tile[::4, :, 1].astype(np.int16)
    return float(np.abs(np.diff(green, axis=1)).mean()) if green.shape[1] > 1 else 0.0


def native_crops(image: NDArray[np.uint8], settings: ViewSettings) -> NDArray[np.uint8]:
    """Crops of native pixels, N x P x P x 3, from the most textured place to an almost flat one.

    The choice depends on the pixels alone. An image smaller than a crop is mirrored up; one with fewer
    places than crops gives some of them twice.
    """
    px = settings.crop_px
    height, width = image.shape[:2]
    if height < px or width < px:
        image = np.pad(image, ((0, max(0, px - height)), (0, max(0, px - width)), (0, 0)), mode="symmetric")
    tiles = [
        image[top : top + px, left : left + px]
        for top in _starts(image.shape[0], px)
        for left in _starts(image.shape[1], px)
    ]
    order = np.argsort([_contrast(tile) for tile in tiles], kind="stable")
    ranks = np.rint(np.linspace(1, FLATTEST_QUANTILE, settings.crops) * (len(tiles) - 1)).astype(int)
    return np.stack([tiles[order[rank]] for rank in ranks])


def thumbnail(image: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """The whole image squeezed into a square, side_px x side_px x 3."""
    small = Image.fromarray(image).resize((side_px, side_px), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return cast(NDArray[np.uint8], np.asarray(small))


def take_views(image: NDArray[np.uint8], settings: ViewSettings) -> Views:
    """The views of one H x W x 3 uint8 RGB image of any size from 1 x 1 up.

    Raises:
        ValueError: the array has another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected an H x W x 3 uint8 image, found {image.shape} {image.dtype}")
    return Views(native_crops(image, settings), thumbnail(image, settings.thumbnail_px))
