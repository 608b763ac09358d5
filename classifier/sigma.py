"""Standard deviation of white noise in a photograph, from its pixels alone.

Chen, Zhu and Heng, "An Efficient Statistical Method for Image Noise Level Estimation", ICCV 2015: small
patches of a photograph fill a subspace, noise fills all of the space, so the smallest eigenvalues of the
patches' covariance are the noise's variance. Added here: the share of noise that clipping to 0..255 took away, and a
second estimate for brightness alone: of noise without colour most dimensions of a colour patch hold nothing.
"""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

PATCH_PX = 5
"""Colour patches of 5 x 5 pixels: 75 dimensions."""

MOST_PATCHES = 4_000
"""Patches taken from larger images, evenly spread: the cost is bounded; estimates scatter by some 2 % of sigma."""

CLIPPED_SIGMAS = 1.0
"""Patches closer to black or white than this many standard deviations are left out where others suffice."""

FEWEST_PATCHES = 1500
"""A covariance from fewer patches has eigenvalues that scatter too much."""

ROUGH_PATCHES = 750
"""About so many give the first estimate, which only says which patches clipping spares."""

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue in brightness (ITU-R BT.601), as JPEG has it."""

COLOURLESS = 0.2
"""Noise whose sigma over all colours is below this share of what its brightness lets expect has lost its colour."""

TEXTURE_255 = 20.0
"""What texture without noise may give for brightness, on sharp photographs, in the terms of all colours."""

STRONGEST_255 = 75.0
"""No noise of brightness is above this, so that most noise of all colours needs no second estimate."""

_NORMAL = np.linspace(-4, 4, 81)
_DENSITY = np.exp(-0.5 * _NORMAL**2) / np.exp(-0.5 * _NORMAL**2).sum()
_LEVELS = np.arange(-64.0, 320.0)


def _patches(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Patches of an image, N x 3 x (PATCH_PX * PATCH_PX), on the 0..255 scale."""
    height, width = image.shape[0] - PATCH_PX + 1, image.shape[1] - PATCH_PX + 1
    stride = max(1, int(np.ceil(np.sqrt(height * width / MOST_PATCHES))))
    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH_PX, PATCH_PX), axis=(0, 1))
    taken = windows[stride // 2 % height :: stride, stride // 2 % width :: stride]
    return cast(NDArray[np.float32], taken.reshape(-1, 3, PATCH_PX**2).astype(np.float32))


def _noise_variance(patches: NDArray[np.float32]) -> float:
    """Mean of the smallest eigenvalues of the patches' covariance: as many as have their mean at their median."""
    # torch computes here because its threads are those of the network; NumPy's own would compete with them.
    flat = torch.from_numpy(patches.reshape(len(patches), -1))
    centred = flat - flat.mean(dim=0)
    eigenvalues = torch.linalg.eigvalsh((centred.T @ centred).double() / len(flat)).numpy()  # the smallest first
    counts = np.arange(1, len(eigenvalues) + 1)
    means = eigenvalues.cumsum() / counts
    below = np.searchsorted(eigenvalues, means, side="left")
    above = counts - np.minimum(np.searchsorted(eigenvalues, means, side="right"), counts)
    return max(float(means[above >= below][-1]), 0.0)


def _kept_by_clipping(means: NDArray[np.float32], sigma_255: float) -> float:
    """Share of the noise variance that is left after clipping to 0..255, for pixels with these observed means."""
    noisy = np.clip(_LEVELS[:, None] + sigma_255 * _NORMAL, 0, 255)
    observed = noisy @ _DENSITY
    variance = ((noisy - observed[:, None]) ** 2) @ _DENSITY
    counts = np.bincount(np.rint(means).astype(np.intp).ravel(), minlength=256)
    kept = np.average(np.interp(np.arange(256), observed, variance), weights=counts)
    return max(float(kept) / sigma_255**2, 0.05)


def _estimate(patches: NDArray[np.float32]) -> float:
    """Standard deviation of noise that is white over all of the patches' dimensions, N x channels x pixels."""
    sigma_255 = float(np.sqrt(_noise_variance(patches[:: max(1, len(patches) // ROUGH_PATCHES)])))
    if sigma_255 < 0.5:
        return float(np.sqrt(_noise_variance(patches)))
    means = patches.mean(axis=2)
    room = np.minimum(means, 255 - means).min(axis=1)
    fewest = min(FEWEST_PATCHES, len(room))
    enough = float(np.partition(room, -fewest)[-fewest])
    chosen = room >= min(CLIPPED_SIGMAS * sigma_255, enough)
    variance = _noise_variance(patches[chosen])
    for _ in range(2):
        sigma_255 = float(np.sqrt(variance / _kept_by_clipping(means[chosen], sigma_255)))
    return sigma_255


def estimate_sigma(image: NDArray[np.uint8]) -> float:
    """Standard deviation of the noise in an H x W x 3 uint8 image, on the 0..255 scale.

    Noise of brightness alone (of a grey picture, or in a JPEG whose colours are stored at half the size) counts as
    noise of all colours with that much in brightness, 1.5 times its own, which is how a restorer has to take it; it
    is told from texture above `TEXTURE_255` only. Clean photographs give up to about 3, textured ones more. Images
    smaller than a patch give 0.
    """
    if min(image.shape[:2]) < PATCH_PX:
        return 0.0
    patches = _patches(image)
    colour = _estimate(patches)
    if colour > COLOURLESS * STRONGEST_255:
        return colour
    brightness = _estimate(np.tensordot(LUMA, patches, axes=(0, 1))[:, None, :]) / float(np.linalg.norm(LUMA))
    return brightness if brightness > max(TEXTURE_255, colour / COLOURLESS) else colour
