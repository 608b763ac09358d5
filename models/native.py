"""The passes of `models.passes` for x86 processors, compiled from `native.c` when the package is installed.

Without a C compiler there, or on another processor, `library` is None and torch's operators run.
"""

import ctypes
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

from models import passes

_INT64, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_LANES = {"AVX512": 16, "AVX2": 8}
"""Channels that are computed at once; at least so many are needed."""
_MOST_CHANNELS = 2048
"""Of a layer norm."""


class _Wide(ctypes.Structure):
    """`Wide` of `native.c`."""

    _fields_ = (
        ("wide", _POINTER),
        ("taps", _POINTER),
        *((name, _INT64) for name in ("images", "height", "width", "stride", "channels")),
        *((name, _INT) for name in ("half", "border", "threads")),
    )


def _load() -> tuple[ctypes.CDLL | None, int]:
    """The library for this processor, and the number of its lanes."""
    capability = torch.backends.cpu.get_cpu_capability()
    found = find_spec(f"models._native_{capability.lower()}") if capability in _LANES else None
    if found is None or found.origin is None:
        return None, 0
    try:
        return ctypes.CDLL(found.origin), _LANES[capability]
    except OSError as error:  # compiled elsewhere, against libraries that are not here
        warnings.warn(f"models: the compiled passes are not used, which is slower: {error}", stacklevel=2)
        return None, 0


library, _lanes = _load()


def widen(x: Tensor, norm: Tensor, matrix: Tensor, out: Tensor) -> None:
    """See `models.passes.widen`."""
    pixels, channels = x.shape
    if library is None or not _lanes <= channels <= _MOST_CHANNELS:
        passes.widen(x, norm, matrix, out)
        return
    x = x.contiguous()
    normalised = torch.empty_like(x)
    library.dfpir_layer_norm(
        *(_POINTER(tensor.data_ptr()) for tensor in (x, norm, normalised)), _INT64(pixels), _INT64(channels),
        ctypes.c_float(passes.EPS), _INT(x.dtype is torch.bfloat16), _INT(torch.get_num_threads()),
    )  # fmt: skip
    torch.mm(normalised, matrix, out=out)


def _described(wide: Tensor, taps: Tensor, channels: int, border: int) -> _Wide:
    batch, height, width, stride = wide.shape
    half = wide.dtype is torch.bfloat16
    return _Wide(
        wide.data_ptr(), taps.data_ptr(), batch, height - 2 + 2 * border, width, stride, channels, half, border,
        torch.get_num_threads(),
    )  # fmt: skip


def depthwise_gate(wide: Tensor, taps: Tensor, *, border: int) -> Tensor:
    """See `models.passes.depthwise_gate`."""
    channels = wide.shape[-1] // 2
    if library is None or channels < _lanes:
        return passes.depthwise_gate(wide, taps, border=border)
    described = _described(wide, taps, channels, border)
    out = wide.new_empty(described.images, described.height, described.width, described.channels)
    library.dfpir_depthwise_gate(ctypes.byref(described), _POINTER(out.data_ptr()))
    return out


def depthwise_attention(
    wide: Tensor, taps: Tensor, values: Tensor, *, heads: int, border: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `models.passes.depthwise_attention`."""
    batch, height, width, channels = values.shape
    if library is None or channels < _lanes:
        return passes.depthwise_attention(wide, taps, values, heads=heads, border=border)
    described = _described(wide, taps, channels, border)
    query_key = wide.new_empty(2, batch, height * width, heads, channels // heads, dtype=torch.float32)
    power = wide.new_empty(2, batch, height, heads, channels // heads, dtype=torch.float32)
    library.dfpir_depthwise_attention(
        ctypes.byref(described),
        *(_POINTER(tensor.data_ptr()) for tensor in (query_key, power, values)),
        _INT64(values.stride(0)), _INT(values.dtype is torch.bfloat16),
    )  # fmt: skip
    query, key = query_key.transpose(2, 3)
    query_power, key_power = power.sum(2)
    return query.transpose(-2, -1) @ key, query_power, key_power
