"""Triton's kernels against torch's operators: interpreted here, on a GPU where there is one."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from synthetic_weights import tiny_network

from models import bands, orthogonal_bank
from models.inference import InferenceDFPIR

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

INTERPRETED = """
import torch
from models import kernels, passes
kernels._PIXELS_PER_CHUNK = 32
generator = torch.Generator().manual_seed(1)
draw = lambda *shape: torch.randn(shape, generator=generator)
def hold(found, expected):
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert found.shape == expected.shape and difference < 1e-5, difference
taps = draw(20, 1, 3, 3).to(memory_format=torch.channels_last), draw(20, 1, 3, 3)
for border in (0, 1):
    one, other = draw(2, 5, 9, 20), draw(2, 5, 9, 20)
    hold(kernels.depthwise(one, taps[0], border=border), passes.depthwise(one, taps[0], border=border))
    pair = [each.depthwise_gate(one, other, taps, border=border) for each in (kernels, passes)]
    hold(*pair)
    pair = [each.depthwise_similarity(one, other, taps, heads=2, border=border) for each in (kernels, passes)]
    for each in zip(*pair):
        hold(*each)
x, matrices, biases = draw(40, 20) * 3 + 1, draw(3, 20, 33), draw(3, 33)
out = [torch.full((3, 50, 33), 7.0) for _ in range(2)]
kernels.widen(x, matrices, biases, out[0][:, 4:44])
passes.widen(x, matrices, biases, out[1][:, 4:44])
hold(*out)
print("held")
"""

COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models import kernels
def shared(function, constants, **options):
    names = function.arg_names
    pointers = lambda name: "*fp32" if name.startswith(("gram", "query_power", "key_power")) else "*" + dtype
    types = {name: pointers(name) if name.endswith("_ptr") else "i32" for name in names if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared
for dtype in ("bf16", "fp32"):
    print(shared(kernels._depthwise, dict(C=127, BORDER=0, GATED=True, BLOCK_P=64, BLOCK_C=32)))
    print(shared(kernels._similarity, dict(
        C=96, HEADS=1, BORDER=1, CHUNK=4096, BLOCK_P=32, BLOCK_C=128), num_stages=1))
    side = 32 if dtype == "bf16" else 16
    print(shared(kernels._widen, dict(C=384, M=1021, EPS=1e-5, BLOCK_N=side, BLOCK_C=512, BLOCK_M=side)))
"""


def printed(script: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_kernel_gives_what_torch_gives_in_the_interpreter():
    assert printed(INTERPRETED, TRITON_INTERPRET="1") == ["held"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compile_for_an_h100_and_fit_the_shared_memory_of_any_gpu():
    assert max(map(int, printed(COMPILED))) <= 96 << 10


def test_without_working_kernels_a_gpu_runs_torchs_operators(monkeypatch):
    bands.passes_for.cache_clear()
    monkeypatch.setitem(sys.modules, "models.kernels", None)
    with pytest.warns(UserWarning, match="not used on cuda:7"):
        assert bands.passes_for(torch.device("cuda", 7)) is bands.passes
    bands.passes_for.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_on_a_gpu_equals_the_plain_one(dtype):
    from models import kernels

    device = torch.device("cuda", 0)
    kernels.check(device)
    assert bands.passes_for(device) is kernels
    plain, bank = tiny_network(5), orthogonal_bank()
    image = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = plain(image, bank.embeddings[[0, 3, 5]])
        form = InferenceDFPIR(plain, bank, dtype=dtype).to(device)
        found = form(image.to(device), torch.tensor([0, 3, 5], device=device)).cpu()
    assert (found - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 5e-2)
