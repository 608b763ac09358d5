"""How much memory a restoration takes, and how much there is."""

import os
from pathlib import Path

import torch

from models.dfpir import DFPIRConfig


def bytes_per_pixel(config: DFPIRConfig, dtype: torch.dtype) -> float:
    """Peak memory of the inference form per pixel of padded input, estimated from above.

    The peak lies in the blocks of the last level: two maps of 2 dim channels at the stem's resolution, of which a
    fifth more is asked for what the allocator keeps. The image itself is held as float32 up to five times. The bands
    add some 100 MB whatever the size of the image. Measured by `benchmarks/engine.py`.
    """
    maps = 1.2 * 4 * config.dim * dtype.itemsize / config.unshuffle_factor**2
    return maps + 5 * 3 * 4


def available_bytes(device: torch.device) -> int:
    """Memory that is free to use on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_system_available_bytes(), _group_available_bytes())


def _system_available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # Not Linux: free memory is not told there, so half of what is installed stands for it.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _group_available_bytes() -> int:
    """What is left of a container's limit, which /proc/meminfo does not know of."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - used)
