"""How good a result is: PSNR and SSIM against a reference, and figures that need none.

Images are H x W x 3, uint8 or uint16, RGB; both of a pair have the same shape and dtype.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.images import Pixels

PSNR_CAP_DB = 100.0
"""Stands for the infinite PSNR of equal images, so that means stay finite."""
SSIM_WINDOW_PX = 11


def psnr_db(image: Pixels, reference: Pixels) -> float:
    """Peak signal-to-noise ratio over all pixels and channels in dB, at most 100.

    Raises ValueError if sizes or dtypes differ.
    """
    # torchmetrics takes seconds to import; a run without references never needs it.
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_pair(image, reference)
    value = peak_signal_noise_ratio(_unit_tensor(image), _unit_tensor(reference), data_range=1.0)
    return min(float(value), PSNR_CAP_DB)


def ssim(image: Pixels, reference: Pixels) -> float | None:
    """Structural similarity (Wang et al. 2004), mean over channels and over windows wholly inside the image.

    Gaussian window of 11 x 11 px with sigma 1.5, data range 1. None for an image with a side below 11 px,
    in which no window fits.

    Raises ValueError if sizes or dtypes differ.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(image, reference)
    if min(image.shape[:2]) < SSIM_WINDOW_PX:
        return None
    result = structural_similarity_index_measure(
        _unit_tensor(image), _unit_tensor(reference), sigma=1.5, data_range=1.0, return_full_image=True
    )
    # The mean that torchmetrics returns includes windows over mirrored borders; the field's does not.
    border = SSIM_WINDOW_PX // 2
    windows = result[1][:, :, border:-border, border:-border]
    return float(windows.mean(dtype=torch.float64))


def change_rmse_255(before: Pixels, after: Pixels) -> float:
    """Root mean square difference of two images on the 0..255 scale; raises ValueError if they do not match."""
    _check_pair(before, after)
    difference = after.astype(np.float32) - before.astype(np.float32)
    return float(np.sqrt(np.mean(np.square(difference), dtype=np.float64))) * 255 / np.iinfo(before.dtype).max


def clipped_fraction(image: Pixels) -> float:
    """Share of all values, channels counted one by one, that are at either end of the range."""
    return float(np.mean((image == 0) | (image == np.iinfo(image.dtype).max)))


def _check_pair(image: Pixels, reference: Pixels) -> None:
    if image.shape != reference.shape:
        raise ValueError(f"images of different sizes cannot be compared: {_size(image)} and {_size(reference)}")
    if image.dtype != reference.dtype:
        raise ValueError(f"images of different depth cannot be compared: {image.dtype} and {reference.dtype}")


def _size(image: NDArray[np.generic]) -> str:
    height, width = image.shape[:2]
    return f"{width} x {height}"


def _unit_tensor(image: Pixels) -> Tensor:
    """1 x 3 x H x W float32 in [0, 1], channels last in memory, in which torch convolves several times faster."""
    scaled = image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)
    return torch.from_numpy(scaled).permute(2, 0, 1)[None]
