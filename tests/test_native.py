"""The compiled passes against torch's operators; both generations of processors where this one has both."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from synthetic_weights import tiny_network

from models import bands, native, orthogonal_bank, passes
from models.inference import InferenceDFPIR
from models.products import Product

compiled = pytest.mark.skipif(native.library is None, reason="compiled for no processor like this one")
SUM = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Of the largest value: torch rounds queries and keys to bfloat16 before it sums up, the compiled passes do not."""
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def hold(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in native.PROCESSORS, reason="not compiled for this one"
)
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_where_there_is_a_compiler_they_are_compiled():
    assert native.library is not None
    assert bands.passes_for(torch.device("cpu")) is native
    has_tiles = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu.get_capabilities().get("amx_bf16")
    assert (native.tiles is not None) == bool(has_tiles)


@compiled
def test_what_was_compiled_for_other_code_is_left_alone(monkeypatch):
    kind = torch.backends.cpu.get_cpu_capability().lower()
    assert native._load(kind) is not None
    monkeypatch.setattr(native, "_VERSION", native._VERSION + 1)
    with pytest.warns(UserWarning, match="is of version 3, not 4; install the package again"):
        assert native._load(kind) is None


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 20, 24, 48, 100])
def test_layer_norm_and_product(dtype, channels):
    x = (3 * drawn(200, channels) + drawn(200, 1)).to(dtype)
    norm, product = drawn(2, channels), Product(drawn(channels, 27), dtype)
    found, expected = torch.zeros(2, 200, 40, dtype=dtype)
    native.widen(x, norm, product, found[:, 5:32])
    passes.widen(x, norm, product, expected[:, 5:32])
    hold(found, expected, ROUNDED[dtype])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("border", [0, 1])
@pytest.mark.parametrize(("batch", "width", "channels"), [(1, 70, 48), (2, 33, 16), (3, 32, 20), (1, 1, 100)])
def test_3x3_and_gate(dtype, border, batch, width, channels):
    # Values up to 20, where GELU has long become the identity or nothing.
    wide, taps = (2 * drawn(batch, 5, width, 2 * channels)).to(dtype), drawn(9, 2 * channels, dtype=dtype)
    found = native.depthwise_gate(wide, taps, border=border)
    exact = passes.depthwise_gate(wide.double(), taps.double(), border=border)
    hold(found, exact.to(dtype), ROUNDED[dtype])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("border", [0, 1])
@pytest.mark.parametrize(("batch", "width", "channels"), [(1, 70, 48), (2, 33, 16), (3, 32, 20), (1, 1, 100)])
def test_3x3_values_and_similarities(dtype, values_dtype, border, batch, width, channels):
    wide, taps = drawn(batch, 5, width, 3 * channels, dtype=dtype), drawn(9, 3 * channels, dtype=dtype)
    # Room in a taller map, as bands have it.
    maps = torch.zeros(2, batch, 9, width, channels, dtype=values_dtype)
    found, expected = (each[:, 2 : 5 + 2 * border] for each in maps)
    sums = native.depthwise_attention(wide, taps, found, heads=2, border=border)
    exact = passes.depthwise_attention(wide, taps, expected, heads=2, border=border)
    hold(maps[0], maps[1], max(ROUNDED[dtype], ROUNDED[values_dtype]))
    for pair in zip(sums, exact, strict=True):
        hold(*pair, SUM[dtype])


@compiled
def test_too_few_channels_are_left_to_torch():
    wide, taps, values = drawn(1, 4, 6, 12), drawn(9, 12), torch.empty(1, 2, 6, 4)
    assert torch.equal(native.depthwise_gate(wide, taps, border=0), passes.depthwise_gate(wide, taps, border=0))
    sums = native.depthwise_attention(wide, taps, values, heads=1, border=0)
    assert torch.equal(sums[0], passes.depthwise_attention(wide, taps, torch.empty_like(values), heads=1, border=0)[0])
    assert torch.equal(native.normalise(drawn(3, 4), drawn(2, 4)), passes.normalise(drawn(3, 4), drawn(2, 4)))


def hold_packed(product: Product, count: int, *, started: bool, exact: bool) -> None:
    """That a product computed by the compiled code is right, in a place of its own and in that of `start`."""
    matrix = product.matrix.clone()
    depth, columns = matrix.shape
    product.pack(exact=exact)
    assert product.packed is not None
    assert product.matrix.numel() == 0
    x, start = drawn(count, depth), drawn(count, columns + 3)[:, 3:] if started else None
    found = torch.zeros(count + 1, columns + 9)
    product(x, found[:count, 5:-4], start=start)
    expected = x.double() @ matrix.double() + (0 if start is None else start.double())
    assert found[:, :5].abs().max() == found[:, -4:].abs().max() == found[count].abs().max() == 0
    error = (found[:count, 5:-4] - expected).abs().max()
    assert error <= (1e-6 if exact else 1e-5) * expected.abs().max()
    if not exact:  # the tiles did it, and not with one product of bfloat16 parts alone, which would be off by 2^-9
        assert not torch.equal(found[:count, 5:-4], torch.mm(x, matrix) + (0 if start is None else start))
    if start is not None:
        place = start.clone()
        product(x, place, start=place)
        assert torch.equal(place, found[:count, 5:-4])


@pytest.mark.skipif(not native._PANEL, reason="for processors with AVX2 alone")
@pytest.mark.parametrize(
    ("count", "depth", "columns"), [(96, 96, 288), (100, 48, 72), (53, 1024, 8), (5, 24, 2048), (1, 20, 16)]
)
@pytest.mark.parametrize("started", [True, False])
def test_products_in_panels(count, depth, columns, started):
    hold_packed(Product(drawn(depth, columns), torch.float32), count, started=started, exact=True)


@pytest.mark.skipif(not native._PANEL, reason="for processors with AVX2 alone")
def test_a_float32_networks_products_are_in_panels_unless_columns_are_no_whole_vectors():
    form = InferenceDFPIR(tiny_network(), orthogonal_bank())
    assert all(module.packed is not None for module in form.modules() if isinstance(module, Product))
    assert native.packed(torch.ones(16, 20), exact=True) is None


@pytest.mark.skipif(native.tiles is None, reason="this processor has no AMX tiles")
@pytest.mark.parametrize(("count", "depth", "columns"), [(64, 96, 288), (100, 48, 144), (33, 1024, 16), (5, 24, 2048)])
@pytest.mark.parametrize("started", [True, False])
def test_products_on_tiles(count, depth, columns, started):
    hold_packed(Product(drawn(depth, columns), torch.float32), count, started=started, exact=False)


@pytest.mark.skipif(native.tiles is None, reason="this processor has no AMX tiles")
def test_float32_networks_and_matrices_that_do_not_fit_leave_tiles_alone():
    def packed(dtype: torch.dtype) -> list[bool]:
        form = InferenceDFPIR(tiny_network(), orthogonal_bank(), dtype=dtype)
        return [m.packed is not None for m in form.modules() if isinstance(m, Product)]

    assert native.packed(torch.ones(2049, 16), exact=False) is None
    assert native.packed(torch.ones(16, 4112), exact=False) is None
    assert native.packed(torch.ones(16, 24), exact=False) is None
    assert not any(packed(torch.float32))
    assert any(packed(torch.bfloat16))


def test_the_network_is_the_same_without_them(monkeypatch):
    network, bank = tiny_network(6), orthogonal_bank()
    image, prompts = torch.rand(1, 3, 48, 32, generator=torch.Generator().manual_seed(6)), torch.tensor([2])
    with torch.inference_mode():
        usual = InferenceDFPIR(network, bank)(image, prompts)
        monkeypatch.setattr(bands, "passes_for", lambda device: passes)
        without = InferenceDFPIR(network, bank)(image, prompts)
    assert (usual - without).abs().max() <= 1e-5


@compiled
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this processor has no other")
def test_processors_with_avx2_alone():
    """torch looks for the variable once, when it is loaded."""
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not avx2"],
        check=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
    )
