"""Standard deviation of white noise in a photograph, from its pixels alone.

Chen, Zhu and Heng, "An Efficient Statistical Method for Image Noise Level Estimation", ICCV 2015: small
patches of a photograph fill a subspace, noise fills all of the space, so the smallest eigenvalues of the
patches' covariance are the noise's variance. Added here: the share of noise that clipping to 0..255 took away, and a
second estimate for brightness alone: of noise without colour most dimensions of a colour patch hold nothing.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PATCH_PX = 5
"""Colour patches of 5 x 5 pixels: 75 dimensions."""

MOST_PATCHES = 2_000
"""About so many patches, half as many again at most, are taken from larger images, evenly spread."""

ROUGH_PATCHES = 500
"""About so many give the first estimate, from which clipping is reckoned with."""

_PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}
"""Whatever the program around has set for its own tensors."""

LUMA = torch.tensor([0.299, 0.587, 0.114], **_PLAIN)
"""Of red, green and blue in brightness (ITU-R BT.601), as JPEG has it."""

_SUM_OF_PATCH = torch.eye(3, **_PLAIN).repeat(PATCH_PX**2, 1)
"""Makes a patch the exact sum of its colours, as a product: a sum over pixels takes over twice as long."""

_LUMA_OF_PATCH = torch.kron(torch.eye(PATCH_PX**2, **_PLAIN), LUMA[:, None])
"""Makes a patch the brightness of its pixels."""

LUMA_NORM = float(LUMA.norm())
"""What white noise of all colours has in brightness, as a share of its sigma."""

COLOURLESS = 0.2
"""Noise whose sigma over all colours is below this share of what its brightness lets expect has lost its colour."""

TEXTURE_255 = 20.0
"""What texture without noise may give for brightness, on sharp photographs, in the terms of all colours."""

FAINTEST_255 = 0.5
"""Noise below this is not clipped."""

STRONGEST_255 = 75.0
"""No noise of brightness is above this, so that most noise of all colours needs no second estimate."""

_NORMAL = np.linspace(-4, 4, 41)
_DENSITY = np.exp(-0.5 * _NORMAL**2) / np.exp(-0.5 * _NORMAL**2).sum()
_LEVELS = np.arange(-64.0, 320.0, 2.0)


def _patches(image: NDArray[np.uint8]) -> Tensor:
    """Patches of an image, N x (PATCH_PX * PATCH_PX * 3) float32, on the 0..255 scale."""
    height, width = image.shape[0] - PATCH_PX + 1, image.shape[1] - PATCH_PX + 1
    places = height * width / MOST_PATCHES  # of which one is taken
    down = max(1, int(np.sqrt(places)))
    right = max(1, round(places / down))
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH_PX, PATCH_PX, 3))[:, :, 0]
    taken = windows[down // 2 % height :: down, right // 2 % width :: right]
    return torch.from_numpy(taken.reshape(-1, PATCH_PX**2 * 3).astype(np.float32))


def _noise_variance(patches: Tensor) -> float:
    """Mean of the smallest eigenvalues of the patches' covariance: as many as have their mean at their median."""
    # torch computes here because its threads are those of the network; NumPy's own would compete with them.
    centred = patches - patches.mean(dim=0)
    eigenvalues = torch.linalg.eigvalsh((centred.T @ centred).double() / len(patches)).numpy()  # the smallest first
    counts = np.arange(1, len(eigenvalues) + 1)
    means = eigenvalues.cumsum() / counts
    below = np.searchsorted(eigenvalues, means, side="left")
    above = counts - np.minimum(np.searchsorted(eigenvalues, means, side="right"), counts)
    return max(float(means[above >= below][-1]), 0.0)


def _kept_by_clipping(levels: NDArray[np.intp], sigma_255: float) -> float:
    """Share of the noise variance that is left after clipping to 0..255; `levels` counts pixels by observed mean."""
    noisy = np.clip(_LEVELS[:, None] + sigma_255 * _NORMAL, 0, 255)
    observed = noisy @ _DENSITY
    variance = (noisy * noisy) @ _DENSITY - observed**2
    kept = np.average(np.interp(np.arange(256), observed, variance), weights=levels)
    return max(float(kept) / sigma_255**2, 0.05)


def _sigma(patches: Tensor, means: Tensor, rough_255: float) -> float:
    """Standard deviation of noise that is white over all of the patches' dimensions."""
    variance = _noise_variance(patches)
    if variance < FAINTEST_255**2:
        return float(np.sqrt(variance))
    levels = np.bincount(means.round().long().flatten().numpy(), minlength=256)
    sigma_255 = rough_255
    for _ in range(2):
        sigma_255 = float(np.sqrt(variance / _kept_by_clipping(levels, sigma_255)))
    return sigma_255


def estimate_sigma(image: NDArray[np.uint8]) -> float:
    """Standard deviation of the noise in an H x W x 3 uint8 image, on the 0..255 scale.

    Noise of brightness alone (of a grey picture, or in a JPEG whose colours are stored at half the size) counts as
    noise of all colours with that much in brightness, 1.5 times its own, which is how a restorer has to take it; it
    is told from texture above `TEXTURE_255` only. Clean photographs give up to about 3, textured ones more. Images
    smaller than a patch give 0, and those of less than some 20 px a side too little.
    """
    if min(image.shape[:2]) < PATCH_PX:
        return 0.0
    with torch.autocast("cpu", enabled=False):
        return _estimated(_patches(image))


def _estimated(patches: Tensor) -> float:
    # A first look at the brightness of some, whose covariance is small, says how far noise reaches.
    some = patches[:: max(1, len(patches) // ROUGH_PATCHES)]
    rough = float(np.sqrt(_noise_variance(some @ _LUMA_OF_PATCH))) / LUMA_NORM
    if rough < FAINTEST_255:
        return float(np.sqrt(_noise_variance(patches)))
    means = patches @ _SUM_OF_PATCH / PATCH_PX**2
    colour = _sigma(patches, means, rough)
    if colour > COLOURLESS * STRONGEST_255:
        return colour
    luma = _sigma(patches @ _LUMA_OF_PATCH, means @ LUMA, rough * LUMA_NORM) / LUMA_NORM
    return luma if luma > max(TEXTURE_255, colour / COLOURLESS) else colour
