"""The passes of `models.passes` for x86 processors, compiled from `native.c` when the package is installed.

Without a C compiler there, or on another processor, `library` is None and torch's operators run. Products of float32
matrices are in `native.c` as well, for processors with AVX2 alone, and in `native_amx.c` for those with AMX tiles;
`tiles` is None elsewhere.
"""

from __future__ import annotations

import ctypes
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from models import passes

if TYPE_CHECKING:
    from models.products import Product

_INT64, _INT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
PROCESSORS = ("AVX512", "AVX2")
"""What `native.c` is compiled for, in torch's terms."""
_VERSION = 3
"""Of what is called here; compiled code of another one is left alone."""
_TILE_DEPTH, _TILE_COLUMNS = 32, 16
"""Of a matrix, as tiles hold it."""


class _Wide(ctypes.Structure):
    """`Wide` of `native.c`."""

    _fields_ = (
        ("wide", _POINTER),
        ("taps", _POINTER),
        *((name, _INT64) for name in ("images", "height", "width", "stride", "channels")),
        *((name, _INT) for name in ("half", "border", "threads")),
    )


class _Product(ctypes.Structure):
    """`Product` of `native.c` and of `native_amx.c`."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "packed", "start", "out")),
        *((name, _INT64) for name in ("count", "depth", "columns", "start_stride", "out_stride")),
        ("threads", _INT),
    )


def _constant(loaded: ctypes.CDLL | None, name: str) -> int:
    """One of the numbers that are fixed when the C is compiled; 0 without it. Raises ValueError for an unknown name."""
    return 0 if loaded is None else ctypes.c_int.in_dll(loaded, name).value


def _load(kind: str) -> ctypes.CDLL | None:
    found = find_spec(f"models._native_{kind}")
    if found is None or found.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(found.origin)
        if (version := _constant(loaded, "dfpir_version")) != _VERSION:
            raise ValueError(f"{found.origin} is of version {version}, not {_VERSION}; install the package again")
    except (OSError, ValueError) as error:  # compiled elsewhere, against libraries that are not here, or for other code
        warnings.warn(f"models: what was compiled is not used, which is slower: {error}", stacklevel=2)
        return None
    return loaded


_capability = torch.backends.cpu.get_cpu_capability()
library = _load(_capability.lower()) if _capability in PROCESSORS else None


def _load_tiles() -> ctypes.CDLL | None:
    known = _capability == "AVX512" and torch.cpu.get_capabilities().get("amx_bf16", False)
    loaded = _load("amx") if known else None
    return loaded if loaded is not None and loaded.dfpir_amx_allowed() else None


tiles = _load_tiles()


_LANES = _constant(library, "dfpir_lanes")
"""Channels that are computed at once; at least so many are needed."""
_MOST_CHANNELS = _constant(library, "dfpir_most_channels")
"""Of queries and of keys."""
_PANEL = _constant(library, "dfpir_panel") if _capability == "AVX2" else 0
"""Columns of a matrix that are multiplied at once; 0 where torch's own library has not been found to be slower."""
_MOST_DEPTH = _constant(tiles, "dfpir_amx_most_depth")
_MOST_COLUMNS = _constant(tiles, "dfpir_amx_most_columns")
"""Of a matrix for the tiles, as is `_MOST_DEPTH`."""


def normalise(x: Tensor, norm: Tensor) -> Tensor:
    """See `models.passes.normalise`."""
    pixels, channels = x.shape
    if library is None or channels < _LANES:
        return passes.normalise(x, norm)
    x = x.contiguous()
    normalised = torch.empty_like(x)
    library.dfpir_layer_norm(
        *(_POINTER(tensor.data_ptr()) for tensor in (x, norm, normalised)), _INT64(pixels), _INT64(channels),
        ctypes.c_float(passes.EPS), _INT(x.dtype is torch.bfloat16), _INT(torch.get_num_threads()),
    )  # fmt: skip
    return normalised


def widen(x: Tensor, norm: Tensor, product: Product, out: Tensor) -> None:
    """See `models.passes.widen`."""
    product(normalise(x, norm), out)


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
    if library is None or channels < _LANES:
        return passes.depthwise_gate(wide, taps, border=border)
    described = _described(wide, taps, channels, border)
    out = wide.new_empty(described.images, described.height, described.width, described.channels)
    library.dfpir_depthwise_gate(ctypes.byref(described), _POINTER(out.data_ptr()))
    return out


def depthwise_attention(
    wide: Tensor, taps: Tensor, values: Tensor, *, heads: int, border: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `models.passes.depthwise_attention`."""
    batch, channels = len(values), values.shape[-1]
    if library is None or not _LANES <= channels <= _MOST_CHANNELS:
        return passes.depthwise_attention(wide, taps, values, heads=heads, border=border)
    described = _described(wide, taps, channels, border)
    per_head = channels // heads
    # Each thread sums up what it meets; rows of a Gram matrix are filled up to whole vectors.
    threads, padded = torch.get_num_threads(), -(-per_head // _LANES) * _LANES
    gram = values.new_zeros(threads, batch, heads, per_head, padded, dtype=torch.float32)
    power = values.new_zeros(threads, batch, 2, heads, per_head, dtype=torch.float32)
    library.dfpir_depthwise_attention(
        ctypes.byref(described),
        *(_POINTER(tensor.data_ptr()) for tensor in (gram, power, values)),
        _INT64(heads), _INT64(values.stride(0)), _INT(values.dtype is torch.bfloat16),
    )  # fmt: skip
    query_power, key_power = power.sum(0).unbind(1)
    return gram.sum(0)[..., :per_head], query_power, key_power


def packed(matrix: Tensor, *, exact: bool) -> Tensor | None:
    """A float32 matrix, C_in x C_out, as `product` takes it, or None where that would not be faster than torch.

    With `exact` products are off by rounding alone.
    """
    depth, columns = matrix.shape
    if _PANEL and columns % _LANES == 0:
        return F.pad(matrix, (0, -columns % _PANEL)).view(depth, -1, _PANEL).transpose(0, 1).contiguous()
    fits = columns % _TILE_COLUMNS == 0 and depth <= _MOST_DEPTH and columns <= _MOST_COLUMNS
    if exact or tiles is None or not fits:
        return None
    rows = F.pad(matrix, (0, 0, 0, -depth % _TILE_DEPTH))
    large = rows.bfloat16()
    parts = torch.stack([large, (rows - large.float()).bfloat16()])
    pairs = parts.view(2, -1, _TILE_DEPTH // 2, 2, columns // _TILE_COLUMNS, _TILE_COLUMNS)
    return pairs.permute(0, 4, 1, 2, 5, 3).contiguous()


def product(x: Tensor, packed: Tensor, out: Tensor, start: Tensor | None) -> None:
    """Writes `start + x @ matrix`, N x C_out float32, to `out`; on tiles off by some 1e-5 of the terms."""
    x = x.contiguous()
    described = _Product(
        x.data_ptr(), packed.data_ptr(), None if start is None else start.data_ptr(), out.data_ptr(),
        len(x), x.shape[1], out.shape[1], 0 if start is None else start.stride(0), out.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    if packed.dtype is torch.float32:
        assert library is not None
        library.dfpir_product(ctypes.byref(described))
    else:
        assert tiles is not None
        tiles.dfpir_amx_product(ctypes.byref(described))
