"""Which precision a device computes fastest in."""

import torch


def fastest_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (CUDA, AMX, AVX-512 BF16), else float32.

    Elsewhere bfloat16 is emulated: on a CPU with AVX2 alone a training step takes ten times as long in it.
    """
    capabilities = torch.cpu.get_capabilities()
    native = (
        torch.device(device).type == "cuda"
        or capabilities.get("amx_bf16", False)
        or capabilities.get("avx512_bf16", False)
    )
    return torch.bfloat16 if native else torch.float32
