"""Padding to a multiple by mirroring, for images of any size from 1 x 1 up."""

import torch
from torch import Tensor


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The smallest size, in pixels, that holds the image and has both sides multiples of `multiple`."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def _mirrored(length: int, target: int) -> Tensor:
    """Positions 0..length-1 there and back, edge included, over and over: the first `target` of them."""
    position = torch.arange(target) % (2 * length)
    return torch.minimum(position, 2 * length - 1 - position)


def pad(image: Tensor, height: int, width: int) -> Tensor:
    """Extends ... x H x W below and to the right to `height` x `width` by symmetric mirroring, edge included.

    The image repeats as often as needed, so that a single pixel can fill any size. Cropping to H x W gives the
    image back.
    """
    if image.shape[-2] != height:
        image = image.index_select(-2, _mirrored(image.shape[-2], height).to(image.device))
    if image.shape[-1] != width:
        image = image.index_select(-1, _mirrored(image.shape[-1], width).to(image.device))
    return image
