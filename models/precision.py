"""Which precision a device computes fastest in."""

import torch


def fastest_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (NVIDIA from Ampere on, AMX, AVX-512 BF16), else float32.

    A GPU that is not in this machine, but elsewhere in a cluster, is taken for one that does.

    Elsewhere bfloat16 is emulated: on a CPU with AVX2 alone a training step takes many times as long in it
    (docs/decisions/0010), with AVX-512 alone a restoration twice as long (docs/decisions/0035).
    """
    if torch.device(device).type == "cuda":
        native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32
