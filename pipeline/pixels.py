"""Batches of images on any device: convolution, light, and what differs from image to image of a batch.

Images are B x C x H x W float32.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.point_spread import Field, gaussian_kernel


def _fast_length(length: int) -> int:
    """The next length with no prime factor but 2, 3 and 5: Fourier transforms of others are several times slower."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


def _stacked(kernels: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
    """Kernels of any sizes as B x 1 x h x w, filled up with zeros around their middles."""
    before = [max(kernel.shape[axis] // 2 for kernel in kernels) for axis in (0, 1)]
    after = [max(kernel.shape[axis] - kernel.shape[axis] // 2 for kernel in kernels) for axis in (0, 1)]
    stack = np.zeros((len(kernels), 1, before[0] + after[0], before[1] + after[1]), np.float32)
    for place, kernel in zip(stack, kernels, strict=True):
        top, left = (middle - size // 2 for middle, size in zip(before, kernel.shape, strict=True))
        place[0, top : top + kernel.shape[0], left : left + kernel.shape[1]] = kernel
    return stack


def convolve(images: Tensor, kernels: Sequence[NDArray[np.floating]]) -> Tensor:
    """Convolves the channels of each image, B x C x H x W, with its 2-D kernel, borders mirrored; same size out."""
    stack = torch.from_numpy(_stacked(kernels)).to(images.device)
    (height, width), (rows, columns) = images.shape[2:], stack.shape[2:]
    mirrored = images
    for axis, (side, size) in enumerate(((height, rows), (width, columns)), start=2):
        places = np.pad(np.arange(side), (size - 1 - size // 2, size // 2), mode="symmetric")
        mirrored = mirrored.index_select(axis, torch.from_numpy(places).to(images.device))
    shape = _fast_length(mirrored.shape[2]), _fast_length(mirrored.shape[3])
    product = torch.fft.rfft2(mirrored, s=shape) * torch.fft.rfft2(stack, s=shape)
    full = torch.fft.irfft2(product, s=shape)
    return cast(Tensor, full)[:, :, rows - 1 : rows - 1 + height, columns - 1 : columns - 1 + width]


def to_linear(image: Tensor) -> Tensor:
    """The light that was there, from sRGB as displayed (IEC 61966-2-1)."""
    return torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)


def to_srgb(light: Tensor) -> Tensor:
    """The inverse of `to_linear`, clipped to [0, 1]."""
    light = light.clamp(0, 1)
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def sky(images: Tensor) -> Tensor:
    """How much each pixel is like sky, 0..1, B x 1 x H x W: bright, smooth, joined to the top through such pixels.

    What lies in the shadow of a bird is joined to the top by the pixels at its left and at its right.
    """
    soft = [gaussian_kernel(2.0)] * len(images)
    blurred = convolve(images, soft)
    rough = convolve((images - blurred).abs().mean(dim=1, keepdim=True), soft)
    bright = ((blurred.mean(dim=1, keepdim=True) - 0.45) / 0.2).clamp(0, 1)
    like = bright * ((0.03 - rough) / 0.015).clamp(0, 1)
    joined = like.cummin(dim=2).values
    from_left, from_right = _carried(joined, like), _carried(joined.flip(3), like.flip(3)).flip(3)
    return convolve(torch.minimum(from_left, from_right), soft).clamp(0, 1)


def _carried(values: Tensor, like: Tensor) -> Tensor:
    """Values carried to the right, cut down to the least `like` on their way: the largest that reaches each pixel."""
    on_the_way, step = like, 1
    while step < values.shape[3]:  # each round carries them twice as far
        values = torch.maximum(values, torch.minimum(F.pad(values[..., :-step], (step, 0)), on_the_way))
        on_the_way = torch.minimum(on_the_way, F.pad(on_the_way[..., :-step], (step, 0)))
        step *= 2
    return values


EDGE_SHARE = 0.08
"""Of the shorter side: from so far an edge of the picture draws a step of a map to it."""

EDGE_VARIANCE = 1e-3
"""Of brightness around an edge that draws half of a step to it."""


def follow_edges(values: Tensor, images: Tensor) -> Tensor:
    """Maps, B x 1 x H x W, whose steps lie at edges of the images, and are slopes where there are none.

    By a guided filter, whose coefficients are found at a smaller size: a map becomes, around each pixel, a linear
    function of the image's brightness (He and Sun, "Fast Guided Filter", 2015). Its smallest and largest values stay.
    """
    size = images.shape[2:]
    if values.shape[2:] != size:
        return values  # one number for all of an image
    radius_px = EDGE_SHARE * min(size)
    shrink = max(1.0, radius_px / 4)
    reach = max(1, round(radius_px / shrink))
    guide = images.mean(dim=1, keepdim=True)

    def around(maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)

    small = [max(1, round(side / shrink)) for side in size]
    guides, wanted = (F.interpolate(each, small, mode="area") for each in (guide, values))
    mean_guide, mean_wanted = around(guides), around(wanted)
    covariance, variance = around(guides * wanted) - mean_guide * mean_wanted, around(guides**2) - mean_guide**2
    slope = covariance / (variance + EDGE_VARIANCE)
    linear = torch.cat([around(slope), around(mean_wanted - slope * mean_guide)], dim=1)
    linear = F.interpolate(linear, size, mode="bilinear")
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    found = (linear[:, :1] * guide + linear[:, 1:]).clamp(low, high)
    least, most = found.amin(dim=(2, 3), keepdim=True), found.amax(dim=(2, 3), keepdim=True)
    return torch.lerp(low, high, (found - least) / (most - least).clamp_min(1e-6))


class RandomPixels:
    """Random numbers for the pixels of a batch, each image's from a seed of its own."""

    def __init__(self, seeds: Sequence[int], like: Tensor) -> None:
        self.generators = [torch.Generator(like.device).manual_seed(seed) for seed in seeds]
        self.device, self.size = like.device, like.shape[2:]

    def normal(self) -> Tensor:
        """Standard normal, B x 3 x H x W."""
        each = (torch.randn(3, *self.size, generator=g, device=self.device) for g in self.generators)
        return torch.stack(list(each))

    def uniform(self, places: Sequence[int]) -> Tensor:
        """In [0, 1), for these images: B x 1 x H x W."""
        chosen = (self.generators[place] for place in places)
        return torch.stack([torch.rand(1, *self.size, generator=g, device=self.device) for g in chosen])


def column(values: Sequence[Any], like: Tensor) -> Tensor:
    """A number, or one for each channel, for each image: B x 1 (or channels) x 1 x 1."""
    return torch.tensor(np.array(values, np.float32)).to(like.device).view(len(values), -1, 1, 1)


def maps(values: Sequence[Field | float], like: Tensor) -> Tensor:
    """A map, or a number that holds everywhere, for each image: B x 1 x H x W, or B x 1 x 1 x 1 without maps."""
    if not any(isinstance(value, np.ndarray) for value in values):
        return column(values, like)
    size = tuple(like.shape[2:])
    stack = np.stack([np.broadcast_to(np.float32(value), size) for value in values])
    return torch.from_numpy(stack[:, None]).to(like.device)


def mean(images: Tensor) -> Tensor:
    """Of each image over all of it, B x 1 x 1 x 1."""
    return images.mean(dim=(1, 2, 3), keepdim=True)


def quantiles(images: Tensor, quantile: Tensor) -> Tensor:
    """Each image's own quantile, B x 1 x 1 x 1, of B x 1 x H x W."""
    ordered = images.flatten(1).sort(dim=1).values
    place = quantile.flatten(1) * (ordered.shape[1] - 1)
    below = place.floor()
    low, high = ordered.gather(1, below.long()), ordered.gather(1, place.ceil().long())
    return torch.lerp(low, high, place - below).view_as(quantile)
