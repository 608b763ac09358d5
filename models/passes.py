"""The memory-bound passes of a block, in torch's own operators; `models.kernels` has the same for NVIDIA GPUs.

Features are B x H x W x C. `wide` ones lie between a 1x1 and a depth-wise 3x3 convolution: with `border` 0 they have a
row above and one below those that come out, with `border` 1 zeros stand for these.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
"""Of layer norm."""


def convolve(x: Tensor, kernel: Tensor, *, border: tuple[int, int] = (1, 1)) -> Tensor:
    """A 3x3 convolution, dense or depth-wise by the shape of the kernel (C_out x C_in/groups x 3 x 3)."""
    groups = x.shape[-1] // kernel.shape[1]
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=border, groups=groups).permute(0, 2, 3, 1)


def widen(x: Tensor, matrices: Tensor, biases: Tensor, out: Tensor) -> None:
    """Layer norm without affine part, then a product for each part.

    Args:
        x: N x C; its statistics are float32 whatever its dtype.
        matrices: parts x C x M.
        biases: parts x M.
        out: parts x N x M, written to; any strides over parts and N.
    """
    normalised = F.layer_norm(x, x.shape[-1:], eps=EPS)
    for bias, matrix, into in zip(biases, matrices, out, strict=True):
        torch.addmm(bias, normalised, matrix, out=into)


def depthwise(wide: Tensor, kernel: Tensor, *, border: int) -> Tensor:
    """The depth-wise 3x3 convolution alone; `kernel` is C x 1 x 3 x 3."""
    return convolve(wide, kernel, border=(border, 1))


def depthwise_gate(gate: Tensor, value: Tensor, kernels: tuple[Tensor, Tensor], *, border: int) -> Tensor:
    """GELU of the one convolved part, times the other."""
    gate, value = (depthwise(wide, kernel, border=border) for wide, kernel in zip((gate, value), kernels, strict=True))
    return F.gelu(gate).mul_(value)


def depthwise_similarity(
    query: Tensor, key: Tensor, kernels: tuple[Tensor, Tensor], *, heads: int, border: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Products of the convolved parts, summed over pixels; float32 whatever their dtype.

    Returns:
        The Gram matrix `query^T key`, B x heads x C_head x C_head, and the sums of squares of queries and of keys,
        B x heads x C_head.
    """
    batch, channels = len(query), query.shape[-1]
    query, key = (
        depthwise(wide, kernel, border=border).float().reshape(batch, -1, heads, channels // heads).transpose(1, 2)
        for wide, kernel in zip((query, key), kernels, strict=True)
    )
    return query.transpose(-2, -1) @ key, query.square().sum(-2), key.square().sum(-2)
