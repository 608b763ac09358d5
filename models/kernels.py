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

_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of a result's largest value."""
_PIXELS_PER_CHUNK = 4096
"""Pixels whose products one program sums up."""


@triton.jit
def _widen(
    x_ptr, matrix_ptr, bias_ptr, out_ptr, count, out_part_stride, out_row_stride,
    C: tl.constexpr, M: tl.constexpr, EPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    channels = tl.arange(0, BLOCK_C)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows[:, None] < count) & (channels[None, :] < C)
    loaded = tl.load(x_ptr + rows[:, None].to(tl.int64) * C + channels[None, :], mask=inside, other=0.0)
    x = loaded.to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / C
    normalised = (centred / tl.sqrt(variance + EPS)[:, None]).to(loaded.dtype)
    within = (channels[:, None] < C) & (columns[None, :] < M)
    matrix = tl.load(matrix_ptr + part * C * M + channels[:, None] * M + columns[None, :], mask=within, other=0.0)
    bias = tl.load(bias_ptr + part * M + columns, mask=columns < M, other=0.0)
    wide = tl.dot(normalised, matrix, input_precision="ieee") + bias[None, :].to(tl.float32)
    place = out_ptr + part * out_part_stride + rows[:, None].to(tl.int64) * out_row_stride + columns[None, :]
    tl.store(place, wide.to(loaded.dtype), mask=(rows[:, None] < count) & (columns[None, :] < M))


@triton.jit
def _convolved(
    wide_ptr, kernel_ptr, image, pixels, channels, pixel_mask, channel_mask, height, width,
    C: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Pixels x channels of a depth-wise convolution, float32; `pixels` count the rows that come out."""
    rows, columns = pixels // width, pixels % width
    wide_height = height + 2 - 2 * BORDER
    total = tl.zeros((pixels.shape[0], channels.shape[0]), dtype=tl.float32)
    for tap in tl.static_range(9):
        row, column = rows + tap // 3 - BORDER, columns + tap % 3 - 1
        known = pixel_mask & (row >= 0) & (row < wide_height) & (column >= 0) & (column < width)
        place = ((image * wide_height + row) * width + column).to(tl.int64) * C
        mask = known[:, None] & channel_mask[None, :]
        x = tl.load(wide_ptr + place[:, None] + channels[None, :], mask=mask, other=0.0)
        weight = tl.load(kernel_ptr + channels * 9 + tap, mask=channel_mask, other=0.0)
        total += x.to(tl.float32) * weight[None, :].to(tl.float32)
    return total


@triton.jit
def _depthwise(
    gate_ptr, value_ptr, gate_kernel_ptr, value_kernel_ptr, out_ptr, height, width,
    C: tl.constexpr, BORDER: tl.constexpr, GATED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixels = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2)
    pixel_mask, channel_mask = pixels < height * width, channels < C
    result = _convolved(
        value_ptr, value_kernel_ptr, image, pixels, channels, pixel_mask, channel_mask, height, width, C, BORDER
    )
    dtype = value_ptr.dtype.element_ty
    if GATED:
        gate = _convolved(
            gate_ptr, gate_kernel_ptr, image, pixels, channels, pixel_mask, channel_mask, height, width, C, BORDER
        )
        gate = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
        result *= gate
    place = (image * height * width + pixels).to(tl.int64) * C
    mask = pixel_mask[:, None] & channel_mask[None, :]
    tl.store(out_ptr + place[:, None] + channels[None, :], result.to(dtype), mask=mask)


@triton.jit
def _similarity(
    query_ptr, key_ptr, query_kernel_ptr, key_kernel_ptr, gram_ptr, query_power_ptr, key_power_ptr, height, width,
    C: tl.constexpr, HEADS: tl.constexpr, BORDER: tl.constexpr, CHUNK: tl.constexpr,
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
    dtype = query_ptr.dtype.element_ty
    for first in range(0, CHUNK, BLOCK_P):
        pixels = chunk * CHUNK + first + tl.arange(0, BLOCK_P)
        pixel_mask = pixels < height * width
        # Rounded to the features' dtype, as a convolution of its own would leave them; products of these are exact.
        query = _convolved(
            query_ptr, query_kernel_ptr, image, pixels, channels, pixel_mask, channel_mask, height, width, C, BORDER
        ).to(dtype)
        key = _convolved(
            key_ptr, key_kernel_ptr, image, pixels, channels, pixel_mask, channel_mask, height, width, C, BORDER
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


def widen(x: Tensor, matrices: Tensor, biases: Tensor, out: Tensor) -> None:
    """See `models.passes.widen`; x is contiguous."""
    parts, channels, columns = matrices.shape
    x = x.contiguous()
    block_c, block = widen_blocks(channels, x.element_size())
    grid = triton.cdiv(len(x), block), triton.cdiv(columns, block), parts
    _widen[grid](
        x, matrices, biases, out, len(x), out.stride(0), out.stride(1),
        C=channels, M=columns, EPS=EPS,
        BLOCK_N=block, BLOCK_C=block_c, BLOCK_M=block,
    )  # fmt: skip


def depthwise(wide: Tensor, kernel: Tensor, *, border: int) -> Tensor:
    """See `models.passes.depthwise`."""
    return _run_depthwise(wide, wide, (kernel, kernel), border=border, gated=False)


def depthwise_gate(gate: Tensor, value: Tensor, kernels: tuple[Tensor, Tensor], *, border: int) -> Tensor:
    """See `models.passes.depthwise_gate`."""
    return _run_depthwise(gate, value, kernels, border=border, gated=True)


def _run_depthwise(gate: Tensor, value: Tensor, kernels: tuple[Tensor, Tensor], *, border: int, gated: bool) -> Tensor:
    batch, wide_height, width, channels = value.shape
    height = wide_height - 2 + 2 * border
    out = value.new_empty(batch, height, width, channels)
    block_p, block_c = 64, 32
    grid = triton.cdiv(height * width, block_p), triton.cdiv(channels, block_c), batch
    _depthwise[grid](
        gate.contiguous(), value.contiguous(), *(_taps(kernel) for kernel in kernels), out, height, width,
        C=channels, BORDER=border, GATED=gated, BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    return out


def depthwise_similarity(
    query: Tensor, key: Tensor, kernels: tuple[Tensor, Tensor], *, heads: int, border: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `models.passes.depthwise_similarity`."""
    batch, wide_height, width, channels = query.shape
    height, per_head = wide_height - 2 + 2 * border, channels // heads
    chunks = triton.cdiv(height * width, _PIXELS_PER_CHUNK)
    gram = query.new_empty(batch, heads, chunks, per_head, per_head, dtype=torch.float32)
    powers = [query.new_empty(batch, heads, chunks, per_head, dtype=torch.float32) for _ in range(2)]
    _similarity[chunks, heads, batch](
        query.contiguous(), key.contiguous(), *(_taps(kernel) for kernel in kernels), gram, *powers, height, width,
        C=channels, HEADS=heads, BORDER=border, CHUNK=_PIXELS_PER_CHUNK,
        BLOCK_P=32, BLOCK_C=max(16, triton.next_power_of_2(per_head)),
        num_stages=1,  # loads of several steps at once would take more shared memory than there is, in float32
    )  # fmt: skip
    return gram.sum(2), powers[0].sum(2), powers[1].sum(2)


def _taps(kernel: Tensor) -> Tensor:
    """C x 9, row by row of each channel's 3 x 3."""
    return kernel.reshape(len(kernel), 9).contiguous()


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

        x, matrices, biases, out = draw(40, 20), draw(3, 20, 33), draw(3, 33), draw(3, 50, 33)
        there = out.to(device, copy=True)
        passes.widen(x, matrices, biases, out[:, 4:44])
        widen(x.to(device), matrices.to(device), biases.to(device), there[:, 4:44])
        hold(f"widen in {dtype}", there, out)
        # Features of two images, and the taps of two parts.
        wide, taps = (draw(2, 5, 9, 20), draw(2, 5, 9, 20)), (draw(20, 1, 3, 3), draw(20, 1, 3, 3))
        one, other = (each.to(device) for each in wide)
        first, second = (each.to(device) for each in taps)
        for border in (0, 1):
            name = f"depthwise, border {border}, in {dtype}"
            hold(name, depthwise(one, first, border=border), passes.depthwise(wide[0], taps[0], border=border))
            gated = depthwise_gate(one, other, (first, second), border=border)
            hold(f"gated {name}", gated, passes.depthwise_gate(*wide, taps, border=border))
            sums = depthwise_similarity(one, other, (first, second), heads=2, border=border)
            expected = passes.depthwise_similarity(*wide, taps, heads=2, border=border)
            for pair in zip(sums, expected, strict=True):
                hold(f"similarity, {name}", *pair)
