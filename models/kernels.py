"""The passes of `models.passes` as Triton kernels for NVIDIA GPUs; products are left to cuBLAS.

Tested against `models.passes` in Triton's interpreter, and on a GPU where there is one. Blocks are powers of two, as
Triton wants them; what lies beyond a tensor is masked. Sizes are no compile-time constants, so that a network of many
widths is compiled once. Sums over pixels go through partial sums of fixed chunks, never through atomic additions, so
that the same input gives the same bits.
"""

import itertools
import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from models import passes
from models.passes import EPS
from models.products import Product

_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of a result's largest value."""
_COLUMNS, _CHANNELS = 8, 64
"""Of a program of `_depthwise`."""
_PROGRAMS = 1024
"""That fill a GPU."""
_NORMALISED = 4096
"""Features of a program of `_normalise`."""
_MOST_PER_HEAD = 128
"""Channels of a head that `_similarity` takes: for twice as many it would need 256 KiB of shared memory, more than any
GPU's."""


@triton.jit(do_not_specialize=["count"])
def _normalise(x_ptr, norm_ptr, out_ptr, count, width, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_C)
    inside = (rows[:, None] < count) & (channels[None, :] < width)
    place = rows[:, None].to(tl.int64) * width + channels[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=1) / width + EPS)
    scale = tl.load(norm_ptr + channels, mask=channels < width, other=0.0)
    shift = tl.load(norm_ptr + width + channels, mask=channels < width, other=0.0)
    normalised = centred / deviation[:, None] * scale[None, :] + shift[None, :]
    tl.store(out_ptr + place, normalised.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(x):
    """GELU by a rational approximation of the error function, off by 1.5e-7 at most, in half of its instructions.

    Abramowitz and Stegun, "Handbook of mathematical functions", 1964, 7.1.26.
    """
    t = 1.0 / (1.0 + (0.3275911 * 0.7071067811865476) * tl.abs(x))
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    # The normal distribution's share above |x|; exp2 is the one that a GPU has.
    beyond = 0.5 * series * tl.exp2(-0.7213475204444817 * (x * x))
    return x * tl.where(x > 0, 1.0 - beyond, beyond)


@triton.jit
def _tap(taps_ptr, number: tl.constexpr, stride, channels, mask):
    return tl.load(taps_ptr + number * stride + channels, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _taps(taps_ptr, stride, channels, mask):
    """The 3x3 kernels of some channels, row by row; kept in registers, since loading them again takes longer."""
    return (
        _tap(taps_ptr, 0, stride, channels, mask),
        _tap(taps_ptr, 1, stride, channels, mask),
        _tap(taps_ptr, 2, stride, channels, mask),
        _tap(taps_ptr, 3, stride, channels, mask),
        _tap(taps_ptr, 4, stride, channels, mask),
        _tap(taps_ptr, 5, stride, channels, mask),
        _tap(taps_ptr, 6, stride, channels, mask),
        _tap(taps_ptr, 7, stride, channels, mask),
        _tap(taps_ptr, 8, stride, channels, mask),
    )


@triton.jit
def _row(place_ptr, stride, known, columns, width, mask):
    """Features at some places of a row, left of them and right of them."""
    left = tl.load(place_ptr - stride, mask=(known & (columns > 0))[:, None] & mask[None, :], other=0.0)
    middle = tl.load(place_ptr, mask=known[:, None] & mask[None, :], other=0.0)
    right = tl.load(place_ptr + stride, mask=(known & (columns < width - 1))[:, None] & mask[None, :], other=0.0)
    return left, middle, right


@triton.jit
def _add(left, middle, right, k00, k01, k02, k10, k11, k12, k20, k21, k22, upper, lower):
    """Adds a row of features to the rows that come out above, at and below it; the first of these is done then."""
    left, middle, right = left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)
    done = upper + left * k20 + middle * k21 + right * k22
    return done, lower + left * k10 + middle * k11 + right * k12, left * k00 + middle * k01 + right * k02


@triton.jit(do_not_specialize=["height", "width"])
def _depthwise(
    wide_ptr, taps_ptr, out_ptr, height, width, wide_channels, out_channels, first,
    BORDER: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The `out_channels` from `first` on, convolved; times GELU of those from 0 on, if `GATED`.

    A program goes down a strip of rows, so that it loads every row once for its three columns instead of nine times,
    and loads each one while it computes with the one before.
    """
    own = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    strips = tl.cdiv(height, ROWS)
    image, top = tl.program_id(2) // strips, tl.program_id(2) % strips * ROWS
    mask = own < out_channels
    wide_height = height + 2 - 2 * BORDER
    v00, v01, v02, v10, v11, v12, v20, v21, v22 = _taps(taps_ptr, wide_channels, first + own, mask)
    upper = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    lower = upper
    rows = top - BORDER + 0 * columns
    place = ((image * wide_height + rows).to(tl.int64) * width + columns) * wide_channels
    place_ptr = wide_ptr + place[:, None] + own[None, :]
    known = (rows >= 0) & (rows < wide_height) & (columns < width)
    left, middle, right = _row(place_ptr + first, wide_channels, known, columns, width, mask)
    if GATED:
        g00, g01, g02, g10, g11, g12, g20, g21, g22 = _taps(taps_ptr, wide_channels, own, mask)
        gate_upper, gate_lower = upper, upper
        gate_left, gate_middle, gate_right = _row(place_ptr, wide_channels, known, columns, width, mask)
    out_place = ((image * height + top - 2).to(tl.int64) * width + columns) * out_channels
    results_ptr = out_ptr + out_place[:, None] + own[None, :]
    for _ in range(ROWS + 2):
        rows += 1
        place_ptr += width.to(tl.int64) * wide_channels
        known = (rows >= 0) & (rows < wide_height) & (columns < width)
        next_left, next_middle, next_right = _row(place_ptr + first, wide_channels, known, columns, width, mask)
        if GATED:
            gate_next_left, gate_next_middle, gate_next_right = _row(
                place_ptr, wide_channels, known, columns, width, mask
            )
        result, upper, lower = _add(
            left, middle, right, v00, v01, v02, v10, v11, v12, v20, v21, v22, upper, lower
        )  # fmt: skip
        left, middle, right = next_left, next_middle, next_right
        if GATED:
            gate, gate_upper, gate_lower = _add(
                gate_left, gate_middle, gate_right,
                g00, g01, g02, g10, g11, g12, g20, g21, g22, gate_upper, gate_lower,
            )  # fmt: skip
            gate_left, gate_middle, gate_right = gate_next_left, gate_next_middle, gate_next_right
            result *= _gelu(gate)
        out_rows = rows - 3 + BORDER
        inside = (out_rows >= top) & (out_rows < height) & (columns < width)
        tl.store(results_ptr, result.to(out_ptr.dtype.element_ty), mask=inside[:, None] & mask[None, :])
        results_ptr += width.to(tl.int64) * out_channels


@triton.jit(do_not_specialize=["height", "width"])
def _dense(
    x_ptr, kernel_ptr, out_ptr, height, width, channels, out_channels,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A 3x3 convolution of all channels: for some pixels and output channels, a product for each tap."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    own = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64) * height * width
    rows, columns = pixel // width, pixel % width
    mask = own < out_channels
    sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    blocks = tl.cdiv(channels, BLOCK_K)
    for step in range(9 * blocks):
        tap, part = step // blocks, step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        row, column = rows + tap // 3 - 1, columns + tap % 3 - 1
        known = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        place = (image + row * width + column)[:, None] * channels + part[None, :]
        x = tl.load(x_ptr + place, mask=known[:, None] & (part < channels)[None, :], other=0.0)
        place = (own[None, :] * 9 + tap) * channels + part[:, None]
        taps = tl.load(kernel_ptr + place, mask=mask[None, :] & (part < channels)[:, None], other=0.0)
        sums = tl.dot(x, taps, sums, input_precision="tf32x3")
    place = (image + pixel)[:, None] * out_channels + own[None, :]
    inside = (pixel < height * width)[:, None] & mask[None, :]
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _similarity(
    pairs_ptr, sums_ptr, pixels, channels, per_head,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk of the pixels: the Gram matrix, and below it the squares of queries and of keys.

    A pixel of `pairs` has its queries and then its keys.
    """
    chunk, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = tl.arange(0, BLOCK_C)
    channel_mask = own < per_head
    gram = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    # Added up over rows at the end: doing so for every block takes longer than its product.
    query_squares = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    key_squares = query_squares
    for begin in range(0, CHUNK, BLOCK_P):
        pixel = chunk * CHUNK + begin + tl.arange(0, BLOCK_P)
        place = (image.to(tl.int64) * pixels + pixel)[:, None] * (2 * channels) + head * per_head + own[None, :]
        mask = (pixel < pixels)[:, None] & channel_mask[None, :]
        query = tl.load(pairs_ptr + place, mask=mask, other=0.0)
        key = tl.load(pairs_ptr + place + channels, mask=mask, other=0.0)
        # float32 as three products of its parts in TF32, which a GPU multiplies many times as fast.
        gram += tl.dot(tl.trans(query), key, input_precision="tf32x3")
        query_squares += query.to(tl.float32) * query.to(tl.float32)
        key_squares += key.to(tl.float32) * key.to(tl.float32)
    place = (image * tl.num_programs(1) + head) * tl.num_programs(0) + chunk
    sums_ptr += place.to(tl.int64) * (per_head + 2) * per_head
    both = channel_mask[:, None] & channel_mask[None, :]
    tl.store(sums_ptr + own[:, None] * per_head + own[None, :], gram, mask=both)
    sums_ptr += per_head * per_head
    tl.store(sums_ptr + own, tl.sum(query_squares, axis=0), mask=channel_mask)
    tl.store(sums_ptr + per_head + own, tl.sum(key_squares, axis=0), mask=channel_mask)


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """See `models.passes.convolve`.

    cuDNN takes some ten milliseconds to plan a convolution of a new size, and photographs come in many.
    """
    batch, height, width, channels = x.shape
    out_channels = len(kernel)
    out = x.new_empty(batch, height, width, out_channels)
    block_c = max(16, min(128, triton.next_power_of_2(out_channels)))
    _dense[triton.cdiv(height * width, 128), triton.cdiv(out_channels, block_c), batch](
        x.contiguous(), kernel.contiguous(memory_format=torch.channels_last), out,
        height, width, channels, out_channels,
        BLOCK_P=128, BLOCK_K=128 // x.element_size() if channels > 16 else 16, BLOCK_C=block_c,
        num_warps=8 if block_c == 128 else 4,
    )  # fmt: skip
    return out


def widen(x: Tensor, norm: Tensor, product: Product, out: Tensor) -> None:
    """See `models.passes.widen`."""
    x = x.contiguous()
    normalised = torch.empty_like(x)
    block_c = triton.next_power_of_2(x.shape[1])
    block_n = max(1, _NORMALISED // block_c)
    _normalise[(triton.cdiv(len(x), block_n),)](
        x, norm, normalised, len(x), x.shape[1], EPS=EPS, BLOCK_N=block_n, BLOCK_C=block_c
    )
    product(normalised, out)


def depthwise_gate(wide: Tensor, taps: Tensor, *, border: int) -> Tensor:
    """See `models.passes.depthwise_gate`."""
    batch, height, width, channels = wide.shape
    out = wide.new_empty(batch, height - 2 + 2 * border, width, channels // 2)
    _run_depthwise(wide, taps, out, first=channels // 2, border=border, gated=True)
    return out


def depthwise_attention(
    wide: Tensor, taps: Tensor, values: Tensor, *, heads: int, border: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `models.passes.depthwise_attention`."""
    batch, height, width, channels = values.shape
    if channels > heads * _MOST_PER_HEAD:
        return passes.depthwise_attention(wide, taps, values, heads=heads, border=border)
    _run_depthwise(wide, taps, values, first=2 * channels, border=border, gated=False)
    pairs = wide.new_empty(batch, height, width, 2 * channels)
    _run_depthwise(wide, taps, pairs, first=0, border=border, gated=False)
    pixels, per_head = height * width, channels // heads
    chunk = pixels_per_chunk(pixels)
    chunks = triton.cdiv(pixels, chunk)
    sums = wide.new_empty(batch, heads, chunks, per_head + 2, per_head, dtype=torch.float32)
    block_c = max(16, triton.next_power_of_2(per_head))
    _similarity[chunks, heads, batch](
        pairs, sums, pixels, channels, per_head,
        CHUNK=chunk, BLOCK_P=128 // wide.element_size(), BLOCK_C=block_c,
        num_stages=3, num_warps=8 if block_c >= 64 else 4,
    )  # fmt: skip
    gram, query_power, key_power = sums.sum(2).split([per_head, 1, 1], dim=2)
    return gram, query_power[:, :, 0], key_power[:, :, 0]


def pixels_per_chunk(pixels: int) -> int:
    """Of an image with so many: enough chunks to fill a GPU, but few sums to be added up."""
    return int(min(4096, max(256, triton.next_power_of_2(pixels // _PROGRAMS))))


def rows_per_program(programs: int) -> int:
    """Of `_depthwise`, if one row each would take so many: the fewer rows, the more of them are loaded twice."""
    return 16 if programs >= 16 * _PROGRAMS else 4


def _run_depthwise(wide: Tensor, taps: Tensor, out: Tensor, *, first: int, border: int, gated: bool) -> None:
    """Writes to `out`, whose images are contiguous: with bands of rows there is one, or else all are."""
    batch, height, width, channels = out.shape
    side = triton.cdiv(channels, _CHANNELS), triton.cdiv(width, _COLUMNS)
    rows = rows_per_program(batch * math.prod(side) * height)
    _depthwise[*side, triton.cdiv(height, rows) * batch](
        wide.contiguous(), taps, out, height, width, wide.shape[-1], channels, first,
        BORDER=border, GATED=gated, ROWS=rows, BLOCK_W=_COLUMNS, BLOCK_C=_CHANNELS, num_warps=4,
    )  # fmt: skip


@torch.inference_mode()
def check(device: torch.device, dtypes: Iterable[torch.dtype] = tuple(_TOLERANCES)) -> None:
    """Holds every kernel on this device against `models.passes` on the CPU.

    Raises RuntimeError naming the kernel that differs, or whatever Triton raises.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        def hold(name: str, found: Tensor, expected: Tensor, tolerance: float = _TOLERANCES[dtype]) -> None:
            difference = (found.cpu().float() - expected.float()).abs().max() / expected.float().abs().max()
            if not difference <= tolerance:
                raise RuntimeError(f"{name} is off by {float(difference):.1e} of its largest value")

        # A part of the columns, as one of two sources has it.
        x, norm, product, out = draw(40, 20), draw(2, 20).float(), Product(draw(20, 33), dtype), draw(40, 50)
        there = out.to(device, copy=True)
        passes.widen(x, norm, product, out[:, 7:40])
        widen(x.to(device), norm.to(device), product.to(device), there[:, 7:40])
        hold(f"widen in {dtype}", there, out)
        for channels, out_channels in ((3, 24), (72, 130)):  # more than a program takes of pixels and of channels
            x, kernel = draw(2, 9, 19, channels), draw(out_channels, channels, 3, 3)
            found = convolve(x.to(device), kernel.to(device))
            hold(f"dense convolution in {dtype}", found, passes.convolve(x, kernel))
        # What a small image and few channels take, then what large ones do.
        for (side, per_head), border in itertools.product(((5, 10), (20, 72)), (0, 1)):
            name = f"border {border}, {side} x {side}, {per_head} channels per head, in {dtype}"
            height, channels = side + 2 - 2 * border, 2 * per_head
            wide, taps = draw(2, height, side, 2 * channels), draw(9, 2 * channels)
            found = depthwise_gate(wide.to(device), taps.to(device), border=border)
            hold(f"gate, {name}", found, passes.depthwise_gate(wide, taps, border=border))
            wide, taps = draw(2, height, side, 3 * channels), draw(9, 3 * channels)
            values = draw(2, side, side, channels)
            values_there = values.to(device, copy=True)
            expected = passes.depthwise_attention(wide, taps, values, heads=2, border=border)
            sums = depthwise_attention(wide.to(device), taps.to(device), values_there, heads=2, border=border)
            hold(f"values, {name}", values_there, values)
            for pair in zip(sums, expected, strict=True):
                hold(f"similarity, {name}", *pair)
