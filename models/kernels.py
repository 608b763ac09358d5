"""The passes of `models.passes` as Triton kernels: each reads its features from memory once and writes its result once.

Tested against `models.passes` in Triton's interpreter, and on a GPU where there is one. Blocks are powers of two, as
Triton wants them; what lies beyond a tensor is masked. Sums over pixels go through partial sums of fixed chunks, never
through atomic additions, so that the same input gives the same bits.
"""

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
_PIXELS_PER_CHUNK = 4096
"""Pixels whose products one program sums up."""


@triton.jit
def _widen(
    x_ptr, norm_ptr, matrix_ptr, out_ptr, count, out_stride,
    C: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_C)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows[:, None] < count) & (channels[None, :] < C)
    loaded = tl.load(x_ptr + rows[:, None].to(tl.int64) * C + channels[None, :], mask=inside, other=0.0)
    x = loaded.to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / C
    scale = tl.load(norm_ptr + channels, mask=channels < C, other=0.0)
    shift = tl.load(norm_ptr + C + channels, mask=channels < C, other=0.0)
    normalised = centred / tl.sqrt(variance + EPS)[:, None] * scale[None, :] + shift[None, :]
    within = (channels[:, None] < C) & (columns[None, :] < M)
    matrix = tl.load(matrix_ptr + channels[:, None] * M + columns[None, :], mask=within, other=0.0)
    wide = tl.dot(normalised.to(loaded.dtype), matrix, input_precision="ieee")
    place = out_ptr + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    tl.store(place, wide.to(loaded.dtype), mask=(rows[:, None] < count) & (columns[None, :] < M))


@triton.jit
def _convolved(
    wide_ptr, taps_ptr, image, pixels, channels, pixel_mask, channel_mask, height, width,
    STRIDE: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Pixels x channels of a depth-wise convolution, float32; `pixels` count the rows that come out.

    `channels` are those among the `STRIDE` of all parts.
    """
    rows, columns = pixels // width, pixels % width
    wide_height = height + 2 - 2 * BORDER
    total = tl.zeros((pixels.shape[0], channels.shape[0]), dtype=tl.float32)
    for tap in tl.static_range(9):
        row, column = rows + tap // 3 - BORDER, columns + tap % 3 - 1
        known = pixel_mask & (row >= 0) & (row < wide_height) & (column >= 0) & (column < width)
        place = ((image * wide_height + row) * width + column).to(tl.int64) * STRIDE
        mask = known[:, None] & channel_mask[None, :]
        x = tl.load(wide_ptr + place[:, None] + channels[None, :], mask=mask, other=0.0)
        weight = tl.load(taps_ptr + tap * STRIDE + channels, mask=channel_mask, other=0.0)
        total += x.to(tl.float32) * weight[None, :].to(tl.float32)
    return total


@triton.jit
def _depthwise(
    wide_ptr, taps_ptr, out_ptr, height, width,
    C: tl.constexpr, STRIDE: tl.constexpr, VALUE: tl.constexpr, BORDER: tl.constexpr, GATED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The `C` channels from `VALUE` on; times GELU of those from 0 on, if `GATED`."""
    pixels = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2)
    pixel_mask, channel_mask = pixels < height * width, channels < C
    result = _convolved(
        wide_ptr, taps_ptr, image, pixels, VALUE + channels, pixel_mask, channel_mask, height, width, STRIDE, BORDER
    )
    if GATED:
        gate = _convolved(
            wide_ptr, taps_ptr, image, pixels, channels, pixel_mask, channel_mask, height, width, STRIDE, BORDER
        )
        result *= 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    place = (image * height * width + pixels).to(tl.int64) * C
    mask = pixel_mask[:, None] & channel_mask[None, :]
    tl.store(out_ptr + place[:, None] + channels[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _similarity(
    wide_ptr, taps_ptr, gram_ptr, query_power_ptr, key_power_ptr, height, width,
    C: tl.constexpr, STRIDE: tl.constexpr, HEADS: tl.constexpr, BORDER: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    per_head: tl.constexpr = C // HEADS
    own = tl.arange(0, BLOCK_C)
    channel_mask = own < per_head
    channels = head * per_head + own
    gram = tl.zeros((BLOCK_C, BLOCK_C), dtype=tl.float32)
    query_power = tl.zeros((BLOCK_C,), dtype=tl.float32)
    key_power = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dtype = wide_ptr.dtype.element_ty
    for first in range(0, CHUNK, BLOCK_P):
        pixels = chunk * CHUNK + first + tl.arange(0, BLOCK_P)
        pixel_mask = pixels < height * width
        # Rounded to the features' dtype, as a convolution of its own would leave them; products of these are exact.
        query = _convolved(
            wide_ptr, taps_ptr, image, pixels, channels, pixel_mask, channel_mask, height, width, STRIDE, BORDER
        ).to(dtype)
        key = _convolved(
            wide_ptr, taps_ptr, image, pixels, C + channels, pixel_mask, channel_mask, height, width, STRIDE, BORDER
        ).to(dtype)
        gram += tl.dot(tl.trans(query), key, input_precision="ieee")
        query_power += tl.sum(query.to(tl.float32) * query.to(tl.float32), axis=0)
        key_power += tl.sum(key.to(tl.float32) * key.to(tl.float32), axis=0)
    place = (image * HEADS + head) * tl.num_programs(0) + chunk
    both = channel_mask[:, None] & channel_mask[None, :]
    tl.store(gram_ptr + (place * per_head + own[:, None]) * per_head + own[None, :], gram, mask=both)
    tl.store(query_power_ptr + place * per_head + own, query_power, mask=channel_mask)
    tl.store(key_power_ptr + place * per_head + own, key_power, mask=channel_mask)


def widen_blocks(channels: int, item_bytes: int) -> tuple[int, int]:
    """Channels of a program of `_widen`, and rows and columns of its product: its factors fit into 64 KiB."""
    block_c = max(16, triton.next_power_of_2(channels))
    return block_c, max(16, min(64, (32 << 10) // (block_c * item_bytes)))


def widen(x: Tensor, norm: Tensor, product: Product, out: Tensor) -> None:
    """See `models.passes.widen`."""
    channels, columns = product.matrix.shape
    block_c, block = widen_blocks(channels, x.element_size())
    grid = triton.cdiv(len(x), block), triton.cdiv(columns, block)
    _widen[grid](
        x.contiguous(), norm, product.matrix, out, len(x), out.stride(0),
        C=channels, M=columns, EPS=EPS,
        BLOCK_N=block, BLOCK_C=block_c, BLOCK_M=block,
    )  # fmt: skip


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
    _run_depthwise(wide, taps, values, first=2 * channels, border=border, gated=False)
    per_head = channels // heads
    chunks = triton.cdiv(height * width, _PIXELS_PER_CHUNK)
    gram = wide.new_empty(batch, heads, chunks, per_head, per_head, dtype=torch.float32)
    powers = [wide.new_empty(batch, heads, chunks, per_head, dtype=torch.float32) for _ in range(2)]
    _similarity[chunks, heads, batch](
        wide.contiguous(), taps, gram, *powers, height, width,
        C=channels, STRIDE=3 * channels, HEADS=heads, BORDER=border, CHUNK=_PIXELS_PER_CHUNK,
        BLOCK_P=32, BLOCK_C=max(16, triton.next_power_of_2(per_head)),
        num_stages=1,  # loads of several steps at once would take more shared memory than there is, in float32
    )  # fmt: skip
    return gram.sum(2), powers[0].sum(2), powers[1].sum(2)


def _run_depthwise(wide: Tensor, taps: Tensor, out: Tensor, *, first: int, border: int, gated: bool) -> None:
    """Writes to `out`, whose images are contiguous: with bands of rows there is one, or else all are."""
    batch, height, width, channels = out.shape
    block_p, block_c = 64, 32
    grid = triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), batch
    _depthwise[grid](
        wide.contiguous(), taps, out, height, width,
        C=channels, STRIDE=wide.shape[-1], VALUE=first, BORDER=border, GATED=gated, BLOCK_P=block_p, BLOCK_C=block_c,
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
        for border in (0, 1):
            name = f"border {border}, in {dtype}"
            wide, taps = draw(2, 5, 9, 40), draw(9, 40)
            found = depthwise_gate(wide.to(device), taps.to(device), border=border)
            hold(f"gate, {name}", found, passes.depthwise_gate(wide, taps, border=border))
            wide, taps, values = draw(2, 5, 9, 60), draw(9, 60), draw(2, 3 + 2 * border, 9, 20)
            values_there = values.to(device, copy=True)
            expected = passes.depthwise_attention(wide, taps, values, heads=2, border=border)
            sums = depthwise_attention(wide.to(device), taps.to(device), values_there, heads=2, border=border)
            hold(f"values, {name}", values_there, values)
            for pair in zip(sums, expected, strict=True):
                hold(f"similarity, {name}", *pair)
