"""Row bands: how the wide features of a block exist a few rows at a time (see `models.inference`)."""

import functools
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import passes
from models.dfpir import ChannelLayerNorm
from models.memory import on_device

BAND_BYTES = {"cpu": 2 << 20, "cuda": 512 << 20}
"""Size of the wide features of one band: what stays in a core's cache, and what fills a GPU."""


def matrix_of(convolution: nn.Module) -> Tensor:
    """The C_out x C_in matrix of a 1x1 convolution, float64: weights are merged in that precision."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.detach().double().flatten(1)


def kernel_of(convolution: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a 3x3 convolution, dense or depth-wise, channels last."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.detach().to(dtype, memory_format=torch.channels_last, copy=True)


@functools.cache
def passes_for(device: torch.device) -> ModuleType:
    """The module whose passes run on a device: Triton's kernels on a GPU, once they have agreed with torch's there."""
    if device.type != "cuda":
        return passes
    try:
        from models import kernels

        with on_device(device):
            kernels.check(device)
    except Exception as error:  # a compiler's faults have no common class
        warnings.warn(f"models: Triton's kernels are not used on {device}, which is slower: {error}", stacklevel=2)
        return passes
    return kernels


def band_rows(x: Tensor, wide_channels: int) -> int:
    """Rows of a band, so that so many channels of it keep within `BAND_BYTES`; all rows of a batch."""
    fitting = BAND_BYTES[x.device.type] // (x.shape[2] * wide_channels * x.element_size())
    return x.shape[1] if len(x) > 1 else min(x.shape[1], max(fitting, 4))


class Similarity:
    """Cosine similarities between channels, summed up over bands of pixels; float32 whatever the features' dtype.

    Rounding the Gram matrix to bfloat16 would change which logits survive in CAAPM.
    """

    def __init__(self, like: Tensor, heads: int) -> None:
        """Nothing summed yet, for features shaped like B x H x W x C."""
        self.heads, self.per_head = heads, like.shape[-1] // heads
        shape = len(like), heads, self.per_head
        self.gram = torch.zeros(*shape, self.per_head, device=like.device)
        self.query_power, self.key_power = (torch.zeros(shape, device=like.device) for _ in range(2))

    def add(self, query: "Wide", key: "Wide") -> None:
        """Adds a band's queries and keys."""
        gram, query_power, key_power = passes_for(query.features.device).depthwise_similarity(
            query.features, key.features, (query.kernel, key.kernel), heads=self.heads, border=query.border
        )
        self.gram += gram
        self.query_power += query_power
        self.key_power += key_power

    def logits(self, temperature: Tensor) -> Tensor:
        """Scaled similarities, B x heads x C_head x C_head; `temperature` is heads x 1 x 1."""
        query_norm, key_norm = (power.sqrt().clamp_min(1e-12) for power in (self.query_power, self.key_power))
        return self.gram / query_norm[..., :, None] / key_norm[..., None, :] * temperature


class Wide(NamedTuple):
    """One part's features between a 1x1 and a depth-wise 3x3 convolution (see `models.passes`), and what is next."""

    features: Tensor
    kernel: Tensor
    border: int

    def convolved(self) -> Tensor:
        """B x h x W x C."""
        out: Tensor = passes_for(self.features.device).depthwise(self.features, self.kernel, border=self.border)
        return out


class Widening(nn.Module):
    """Layer norm and 1x1 convolution, band by band, ahead of a depth-wise 3x3 convolution; B x H x W x C in.

    What comes out is cut into `parts` along the channels (query, key and value; gate and value), each contiguous.
    """

    matrices: Tensor
    """parts x C_in x C_part, the layer norm's affine part folded in."""
    biases: Tensor
    """parts x C_part"""
    kernels: Tensor
    """(parts C_part) x 1 x 3 x 3"""

    def __init__(
        self, norm: ChannelLayerNorm, pointwise: nn.Module, depthwise: nn.Module, *, parts: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        matrix = matrix_of(pointwise)
        affine, shift = norm.body.weight.detach().double(), norm.body.bias.detach().double()
        self.register_buffer("matrices", torch.stack((matrix * affine).T.chunk(parts, dim=1)).to(dtype).contiguous())
        self.register_buffer("biases", torch.stack((matrix @ shift).chunk(parts)).to(dtype))
        self.register_buffer("kernels", kernel_of(depthwise, dtype))

    def forward(
        self, x: Tensor, rows: int, prepare: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[slice, list[Wide]]]:
        """Bands of `rows` rows, and each part's features there; more than one image in one band.

        `prepare`, if given, is applied to rows of x before the layer norm. Every row is projected once: the last two
        of a band are kept for the next one.
        """
        batch, height, width, _ = x.shape
        parts, _, channels = self.matrices.shape
        kernels = self.kernels.chunk(parts)
        widen = passes_for(x.device).widen

        def project(fresh: Tensor, out: Tensor) -> None:
            ready = prepare(fresh) if prepare else fresh.to(self.matrices.dtype)
            widen(ready.flatten(0, 2), self.matrices, self.biases, out)

        if rows >= height:
            whole = x.new_empty(parts, batch, height, width, channels, dtype=self.matrices.dtype)
            project(x, whole.flatten(1, 3))
            yield slice(0, height), [Wide(part, kernel, 1) for part, kernel in zip(whole, kernels, strict=True)]
            return
        # From one row above a band to one row below it.
        buffer = x.new_zeros(parts, rows + 2, width, channels, dtype=self.matrices.dtype)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            known = 1 if top == 0 else 2
            fresh = x[:, top + known - 1 : bottom + 1]
            end = known + fresh.shape[1]
            project(fresh, buffer[:, known:end].flatten(1, 2))
            if bottom == height:
                buffer[:, end] = 0
            inside = bottom - top
            yield (
                slice(top, bottom),
                [Wide(buffer[p : p + 1, : inside + 2], kernels[p], 0) for p in range(parts)],
            )
            buffer[:, :2] = buffer[:, inside : inside + 2].clone()
