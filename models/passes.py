"""The memory-bound passes of a block, in torch's own operators.

`models.native` has the same for the processors that it was compiled for, `models.kernels` for NVIDIA GPUs.

Features are B x H x W x C. `wide` ones lie between 1x1 and depth-wise 3x3 convolutions: with `border` 0 they have a
row above and one below those that come out, with `border` 1 zeros stand for these. Their parts (query, key and value;
gate and value) lie side by side in the channels, and `taps` has the 3x3 convolutions' weights, 9 x channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from models.products import Product

EPS = 1e-5
"""Of layer norm."""


CONVOLVED_BYTES = 256 << 20
"""Of the features that a dense convolution takes at once: oneDNN has no AMX convolution of some gigabytes."""


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """A dense 3x3 convolution, rows by rows where there is much; `kernel` is C_out x C_in x 3 x 3."""
    batch, height, width, channels = x.shape
    rows = max(1, CONVOLVED_BYTES // (batch * width * channels * x.element_size()))
    if rows >= height:
        return _convolve(x, kernel, border=1)
    out = x.new_empty(batch, height, width, len(kernel))
    for top in range(0, height, rows):
        # With the rows above and below; what zeros beyond these change is left out.
        above = min(top, 1)
        band = _convolve(x[:, top - above : top + rows + 1], kernel, border=1)[:, above:]
        out[:, top : top + rows] = band[:, :rows]
    return out


def _convolve(x: Tensor, kernel: Tensor, *, border: int) -> Tensor:
    """A 3x3 convolution, dense or depth-wise by the shape of the kernel (C_out x C_in/groups x 3 x 3)."""
    groups = x.shape[-1] // kernel.shape[1]
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=(border, 1), groups=groups).permute(0, 2, 3, 1)


def normalise(x: Tensor, norm: Tensor) -> Tensor:
    """Layer norm.

    Args:
        x: N x C; its statistics are float32 whatever its dtype.
        norm: scale and shift, 2 x C, float32.

    Returns:
        N x C in the dtype of x.
    """
    scale, shift = norm
    return F.layer_norm(x, x.shape[-1:], scale, shift, EPS)


def widen(x: Tensor, norm: Tensor, product: Product, out: Tensor) -> None:
    """Layer norm, then a product: x is N x C, `norm` 2 x C, `out` N x M with any stride over N."""
    product(normalise(x, norm), out)


def _depthwise(wide: Tensor, taps: Tensor, border: int) -> Tensor:
    return _convolve(wide, taps.T.reshape(-1, 1, 3, 3), border=border)


def depthwise_gate(wide: Tensor, taps: Tensor, *, border: int) -> Tensor:
    """GELU of the one convolved part, times the other: B x h x W x C of 2 C wide channels."""
    gate, value = _depthwise(wide, taps, border).chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def depthwise_attention(
    wide: Tensor, taps: Tensor, values: Tensor, *, heads: int, border: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention between channels needs of convolved queries, keys and values.

    Args:
        wide: 3 C channels.
        taps: see above.
        values: B x h x W x C, written to; each image contiguous.
        heads: parts of C that attend to themselves.
        border: see above.

    Returns:
        Sums over pixels, float32 whatever the features' dtype: the Gram matrix `query^T key`, B x heads x C_head x
        C_head, and the squares of queries and of keys, B x heads x C_head.
    """
    query, key, value = _depthwise(wide, taps, border).chunk(3, dim=-1)
    values.copy_(value)
    query, key = (
        part.float().reshape(len(wide), -1, heads, part.shape[-1] // heads).transpose(1, 2) for part in (query, key)
    )
    return query.transpose(-2, -1) @ key, query.square().sum(-2), key.square().sum(-2)
