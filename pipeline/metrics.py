"""How good a result is: PSNR and SSIM against a reference, and figures that need none.

Images are H x W x 3, uint8 or uint16, RGB; both of a pair have the same shape and dtype.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.images import Pixels

FEW_COLOURS, FLAT_SHARE = 32, 0.9
"""Colours of a picture that is no photograph, and the share of its pixels that have their left neighbour's."""

BLANK_LEVELS = {"uint8": 4, "uint16": 64}
"""By which pixels of one tone may differ in each channel; deep ones may use the bottom of their range alone."""

PSNR_CAP_DB = 100.0
"""Stands for the infinite PSNR of equal images, so that means stay finite."""
SSIM_WINDOW_PX = 11
_SSIM_RADIUS_PX = SSIM_WINDOW_PX // 2
_SSIM_WEIGHTS = np.exp(-0.5 * (np.arange(_SSIM_RADIUS_PX + 1) / 1.5) ** 2).astype(np.float32)
_SSIM_WEIGHTS /= 2 * _SSIM_WEIGHTS.sum() - _SSIM_WEIGHTS[0]
"""Of the Gaussian window at each distance from its middle, along one side."""
_SSIM_VALUES_AT_ONCE = 2**17
"""Of the four maps that are smoothed: so many stay in a processor's cache."""
_VALUES_AT_ONCE = 2**18
"""As many as stay in a processor's cache from one step over them to the next."""


def psnr_db(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio over all pixels and channels in dB, at most 100.

    Raises ValueError if sizes or dtypes differ.
    """
    rmse = change_rmse_255(image, reference)
    return PSNR_CAP_DB if rmse == 0 else min(20 * math.log10(255 / rmse), PSNR_CAP_DB)


def ssim(image: Pixels, reference: Pixels) -> float | None:
    """Structural similarity (Wang et al. 2004), mean over channels and over windows wholly inside the image.

    Gaussian window of 11 x 11 px with sigma 1.5, data range 1. None for an image with a side below 11 px,
    in which no window fits.

    Raises ValueError if sizes or dtypes differ.
    """
    _check_pair(image, reference)
    if min(image.shape[:2]) < SSIM_WINDOW_PX:
        return None
    white = np.iinfo(image.dtype).max
    of_means, of_variances = (0.01 * white) ** 2, (0.03 * white) ** 2
    border = 2 * _SSIM_RADIUS_PX
    rows = image.shape[0] - border
    band = max(8, _SSIM_VALUES_AT_ONCE // (4 * image[0].size) - border)
    total = 0.0
    for first in range(0, rows, band):
        part = slice(first, min(first + band, rows) + border)
        x, y = image[part].astype(np.float32), reference[part].astype(np.float32)
        # Only the sum of both variances is asked for: four maps to smooth instead of five.
        mean_x, mean_y, both, squares = _smoothed(np.stack([x, y, x * y, x * x + y * y]))
        product, sum_of_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
        similarity = (2 * product + of_means) * (2 * (both - product) + of_variances)
        similarity /= (sum_of_squares + of_means) * (squares - sum_of_squares + of_variances)
        total += float(similarity.sum(dtype=np.float64))
    return float(total / (rows * (image.shape[1] - border) * image.shape[2]))


def _smoothed(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """N maps of H x W x C under the Gaussian window, wherever it lies wholly inside them."""
    radius = _SSIM_RADIUS_PX
    for _ in range(2):
        length = maps.shape[1] - 2 * radius
        smoothed = maps[:, radius : radius + length] * _SSIM_WEIGHTS[0]
        pair = np.empty_like(smoothed)
        for distance, weight in enumerate(_SSIM_WEIGHTS[1:], 1):
            before, after = radius - distance, radius + distance
            np.add(maps[:, before : before + length], maps[:, after : after + length], out=pair)
            pair *= weight
            smoothed += pair
        maps = smoothed.swapaxes(1, 2)
    return maps


def change_rmse_255(before: Pixels, after: Pixels) -> float:
    """Root mean square difference of two images on the 0..255 scale; raises ValueError if they do not match."""
    _check_pair(before, after)
    squares = 0.0
    for old, new in zip(_parts(before), _parts(after), strict=True):
        # Twice a comparison in integers, of which a processor does dozens at once, instead of two conversions.
        difference = (np.maximum(old, new) - np.minimum(old, new)).astype(np.float32)
        squares += float(np.dot(difference, difference))
    return math.sqrt(squares / before.size) * 255 / np.iinfo(before.dtype).max


def clipped_fraction(image: Pixels) -> float:
    """Share of all values, channels counted one by one, that are at either end of the range."""
    white = np.iinfo(image.dtype).max
    between = sum(np.count_nonzero(part) - np.count_nonzero(part == white) for part in _parts(image))
    return float(1 - between / image.size)


def is_flat(image: Pixels) -> bool:
    """Whether an image, H x W x 3, is no photograph: of one tone, or of a few colours in areas of their own.

    One tone is that of a page, a lens cap, a frame of black, but for a few levels. A mask, a map of labels or a
    drawing has few colours; so has a very dark photograph, but not in areas.
    """
    few = image[::16, ::16]
    levels = BLANK_LEVELS[str(image.dtype)]
    if all(int(np.ptp(part[:, :, channel])) <= levels for part in (few, image) for channel in range(3)):
        return True
    if not all(_has_few_colours(part) for part in (few, image)):
        return False
    same = sum(int((row[1:] == row[:-1]).all(axis=1).sum()) for row in image)
    return bool(same > FLAT_SHARE * image.shape[0] * (image.shape[1] - 1))


def _has_few_colours(image: Pixels) -> bool:
    found: set[int] = set()
    for row in image:
        red, green, blue = row.astype(np.uint64).T
        found.update(np.unique(red << 32 | green << 16 | blue).tolist())
        if len(found) > FEW_COLOURS:
            return False
    return True


def _parts(image: Pixels) -> Iterator[NDArray[np.uint8 | np.uint16]]:
    """All values of an image, some at a time."""
    values = image.reshape(-1)
    return (values[first : first + _VALUES_AT_ONCE] for first in range(0, values.size, _VALUES_AT_ONCE))


def _check_pair(image: Pixels, reference: Pixels) -> None:
    if image.shape != reference.shape:
        raise ValueError(f"images of different sizes cannot be compared: {_size(image)} and {_size(reference)}")
    if image.dtype != reference.dtype:
        raise ValueError(f"images of different depth cannot be compared: {image.dtype} and {reference.dtype}")


def _size(image: NDArray[np.generic]) -> str:
    height, width = image.shape[:2]
    return f"{width} x {height}"
