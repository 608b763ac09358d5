"""Row bands: how the wide features of a block exist a few rows at a time (see `models.inference`)."""

import functools
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import native, passes
from models.dfpir import ChannelLayerNorm
from models.memory import is_out_of_memory, on_device
from models.products import Product

BAND_BYTES = {"cpu": 2 << 20 if native.library is None else 8 << 20, "cuda": 512 << 20}
"""Size of the wide features of one band: what stays in a core's cache, or in a processor's where each is read once; and
what fills a GPU."""


def matrix_of(convolution: nn.Module) -> Tensor:
    """The C_out x C_in matrix of a 1x1 convolution, float64: weights are merged in that precision."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.detach().double().flatten(1)


def kernel_of(convolution: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a dense 3x3 convolution, channels last."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.detach().to(dtype, memory_format=torch.channels_last, copy=True)


def taps_of(convolution: nn.Module) -> Tensor:
    """The weights of a depth-wise 3x3 convolution, C x 9, row by row."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.detach().flatten(1)


def filled_up(weights: Tensor, parts: int) -> Tensor:
    """Rows of zeros behind each part of the rows, so that it has a multiple of 16, as processors want it."""
    return torch.cat([F.pad(part, (0, 0, 0, -len(part) % 16)) for part in weights.chunk(parts)])


@functools.cache
def passes_for(device: torch.device) -> ModuleType:
    """The module whose passes run on a device: Triton's kernels on a GPU, once they have agreed with torch's there."""
    if device.type != "cuda":
        return passes if native.library is None else native
    try:
        from models import kernels

        with on_device(device):
            kernels.check(device)
    except Exception as error:  # a compiler's faults have no common class
        if is_out_of_memory(error):
            raise  # it may be free again the next time
        warnings.warn(f"models: Triton's kernels are not used on {device}, which is slower: {error}", stacklevel=2)
        return passes
    return kernels


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """A dense 3x3 convolution; see `models.passes.convolve`."""
    module = passes if x.device.type == "cpu" else passes_for(x.device)
    out: Tensor = module.convolve(x, kernel)
    return out


def band_rows(x: Tensor, wide_channels: int) -> int:
    """Rows of a band, so that so many channels of it keep within `BAND_BYTES`; all rows of a batch."""
    fitting = BAND_BYTES[x.device.type] // (x.shape[2] * wide_channels * x.element_size())
    return x.shape[1] if len(x) > 1 else min(x.shape[1], max(fitting, 4))


class Similarity:
    """Cosine similarities between channels, summed up over bands of pixels; float32 whatever the features' dtype.

    Rounding the Gram matrix to bfloat16 would change which logits survive in CAAPM.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.sums: tuple[Tensor, ...] = ()
        """Gram matrix and squared norms of queries and of keys; empty before the first band."""

    def add(self, wide: "Wide", values: Tensor) -> None:
        """Adds a band's queries and keys, and writes its values to `values`, B x h x W x C."""
        found = passes_for(values.device).depthwise_attention(
            wide.features, wide.taps, values, heads=self.heads, border=wide.border
        )
        if not self.sums:
            self.sums = found
            return
        for total, more in zip(self.sums, found, strict=True):
            total += more

    def logits(self, temperature: Tensor) -> Tensor:
        """Scaled similarities, B x heads x C_head x C_head; `temperature` is heads x 1 x 1."""
        gram, *powers = self.sums
        query_norm, key_norm = (power.sqrt().clamp_min(1e-12) for power in powers)
        cosines = gram / query_norm[..., :, None] / key_norm[..., None, :]
        # Of features of a single pixel all are 1 or -1, and which ones are kept must not hang on their rounding.
        cosines = torch.where(cosines.abs() > 1 - 1e-6, cosines.sign(), cosines)
        return cosines * temperature


class Wide(NamedTuple):
    """Features between a 1x1 and a depth-wise 3x3 convolution, and what is next (see `models.passes`)."""

    features: Tensor
    taps: Tensor
    border: int

    def gated(self) -> Tensor:
        """Of gate and value: B x h x W x C."""
        out: Tensor = passes_for(self.features.device).depthwise_gate(self.features, self.taps, border=self.border)
        return out


class Source(NamedTuple):
    """A layer norm, the matrix of a 1x1 convolution behind it, and the weights of the 3x3 ones behind that."""

    norm: ChannelLayerNorm
    matrix: Tensor
    """C_out x C_in."""
    taps: Tensor
    """C_out x 9."""


class Widening(nn.Module):
    """Layer norm and 1x1 convolution, band by band, ahead of a depth-wise 3x3 convolution; B x H x W x C in.

    What comes out has the channels of all sources side by side.
    """

    norms: Tensor
    """sources x 2 x C_in: scale and shift, float32."""
    taps: Tensor
    """9 x (channels of all sources)."""

    def __init__(self, *sources: Source, dtype: torch.dtype) -> None:
        super().__init__()
        norms = [torch.stack([source.norm.body.weight, source.norm.body.bias]) for source in sources]
        self.register_buffer("norms", torch.stack(norms).detach().float())
        self.products = nn.ModuleList(Product(source.matrix.T, dtype) for source in sources)
        self.register_buffer("taps", torch.cat([source.taps for source in sources]).T.to(dtype).contiguous())
        self.columns = [len(source.matrix) for source in sources]

    def forward(self, x: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> Iterator[tuple[slice, Wide]]:
        """Bands of rows, and the features there; more than one image in one band.

        `prepare`, if given, is applied to rows of x before the first layer norm. Every row is projected once: the last
        two of a band are kept for the next one.
        """
        batch, height, width, _ = x.shape
        channels, dtype = self.taps.shape[1], self.taps.dtype
        widen = passes_for(x.device).widen

        def project(fresh: Tensor, out: Tensor) -> None:
            places = torch.split(out, self.columns, dim=1)
            for number, (norm, product, into) in enumerate(zip(self.norms, self.products, places, strict=True)):
                ready = prepare(fresh) if prepare and number == 0 else fresh.to(dtype)
                widen(ready.flatten(0, 2), norm, product, into)

        rows = band_rows(x, channels)
        if rows >= height:
            whole = x.new_empty(batch, height, width, channels, dtype=dtype)
            project(x, whole.flatten(0, 2))
            yield slice(0, height), Wide(whole, self.taps, 1)
            return
        # From one row above a band to one row below it.
        buffer = x.new_empty(1, rows + 2, width, channels, dtype=dtype)
        buffer[:, 0] = 0
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            known = 1 if top == 0 else 2
            fresh = x[:, top + known - 1 : bottom + 1]
            end = known + fresh.shape[1]
            project(fresh, buffer[:, known:end].flatten(0, 2))
            if bottom == height:
                buffer[:, end] = 0
            inside = bottom - top
            yield slice(top, bottom), Wide(buffer[:, : inside + 2], self.taps, 0)
            buffer[:, :2] = buffer[:, inside : inside + 2].clone()
