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
from models import kernels
kernels.pixels_per_chunk = lambda pixels: 256
kernels.rows_per_program = lambda programs: 16 if programs > 100 else 4
kernels._COLUMNS, kernels._CHANNELS = 16, 128  # the interpreter takes half as long for them
interpreted = torch.device("cpu"), [torch.float32]  # the interpreter multiplies no bfloat16 matrices
kernels.check(*interpreted)
print("held")
for name in ("convolve", "widen", "depthwise_gate", "depthwise_attention"):
    whole = getattr(kernels, name)
    def off(*arguments, **options):
        result = whole(*arguments, **options)
        (result[1] if name == "depthwise_attention" else arguments[-1] if result is None else result).mul_(1.001)
        return result
    setattr(kernels, name, off)
    try:
        kernels.check(*interpreted)
    except RuntimeError as error:
        print(name, str(error).partition(" ")[0])
    setattr(kernels, name, whole)
"""

WIDE_HEADS = """
import torch
from models import kernels, passes
kernels._similarity = None
generator = torch.Generator().manual_seed(0)
wide, taps = torch.randn(2, 5, 3, 3 * 258, generator=generator), torch.randn(9, 3 * 258, generator=generator)
found, expected = torch.zeros(2, 2, 5, 3, 258)
sums = kernels.depthwise_attention(wide, taps, found, heads=2, border=1)
for pair in zip((found, *sums), (expected, *passes.depthwise_attention(wide, taps, expected, heads=2, border=1))):
    print(torch.equal(*pair))
"""

COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models import kernels
def shared(function, constants, **options):
    names = function.arg_names
    pointers = lambda name: "*fp32" if name.startswith(("norm", "sums")) else "*" + dtype
    types = {name: pointers(name) if name.endswith("_ptr") else "i32" for name in names if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared
for dtype in ("bf16", "fp32"):
    print(shared(kernels._normalise, dict(EPS=1e-5, BLOCK_N=8, BLOCK_C=512)))
    print(shared(kernels._dense, dict(BLOCK_P=128, BLOCK_K=64 if dtype == "bf16" else 32, BLOCK_C=128), num_warps=8))
    print(shared(kernels._depthwise, dict(BORDER=0, GATED=True, ROWS=16, BLOCK_W=8, BLOCK_C=64)))
    block_p = 64 if dtype == "bf16" else 32
    print(shared(kernels._similarity, dict(CHUNK=1024, BLOCK_P=block_p, BLOCK_C=128), num_stages=3, num_warps=8))
"""


def printed(script: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_kernel_gives_what_torch_gives_in_the_interpreter_and_one_that_does_not_is_named():
    assert printed(INTERPRETED, TRITON_INTERPRET="1") == [
        "held", "convolve", "dense", "widen", "widen", "depthwise_gate", "gate,", "depthwise_attention", "similarity,",
    ]  # fmt: skip


def test_heads_that_no_gpu_has_the_shared_memory_for_are_left_to_torch():
    assert printed(WIDE_HEADS, TRITON_INTERPRET="1") == ["True"] * 4


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
    # TF32 is float32 in name only; a Restorer has it off as well.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = plain(image, bank.embeddings[[0, 3, 5]])
        form = InferenceDFPIR(plain, bank, dtype=dtype, device=device)
        found = form(image.to(device), torch.tensor([0, 3, 5], device=device)).cpu()
    assert (found - expected).abs().max() <= (1e-4 if dtype == torch.float32 else 5e-2)
