"""How much memory a restoration takes, how much there is, and how it is kept."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from models.dfpir import DFPIRConfig
from models.precision import fastest_dtype

_CGROUP, _MEMBERSHIPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.7}
"""Of the memory of a device that a batch may take. The rest of a CPU's is for decoded images and other processes, of a
GPU's for the context, bands, what recordings keep, and the classifier."""


def bytes_per_pixel(config: DFPIRConfig, dtype: torch.dtype, device: str | torch.device = "cpu") -> float:
    """Peak memory of the inference form per pixel of padded input, estimated from above.

    The peak lies in the blocks of the last level: two maps of 2 dim channels at the stem's resolution, of which a
    fifth more is asked for what the allocator keeps, on a GPU seven tenths (docs/decisions/0017). The image itself is
    held as float32 up to five times. The bands add some 100 MB whatever the size of the image, on a GPU some 1.3 GB.
    Where bfloat16 is emulated, the last convolution writes out the neighbours of every pixel. Measured by
    `benchmarks/engine.py`.
    """
    kept = 1.7 if torch.device(device).type == "cuda" else 1.2
    maps = kept * 4 * config.dim * dtype.itemsize / config.unshuffle_factor**2
    emulated = dtype is torch.bfloat16 and fastest_dtype(device) is not dtype
    neighbours = 9 * 2 * config.dim * dtype.itemsize / config.unshuffle_factor**2 if emulated else 0.0
    return maps + neighbours + 5 * 3 * 4


def bytes_needed(pixels: int, config: DFPIRConfig, dtype: torch.dtype, device: str | torch.device) -> int:
    """Memory of a device with so much that an image of so many pixels is restored whole.

    On a GPU two gigabytes more, for what a process takes of it whatever its images: context, bands, recordings.
    """
    kind = torch.device(device).type
    fixed = 2 * 2**30 if kind == "cuda" else 0
    return int(pixels * bytes_per_pixel(config, dtype, device) / MEMORY_SHARE[kind]) + fixed


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, for kernels and graphs that ask for no other; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of a GPU or of the machine.

    torch's CPU allocator says so in words only, and so do CUDA beside torch's allocator, cuBLAS and Triton. oneDNN
    only names what it could not make without.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = "can't allocate memory", "not enough memory", "out of memory", "alloc_failed"
    said = str(error).lower()
    of_onednn = said == "could not create a primitive"  # while it has no descriptor for what it cannot do at all
    return isinstance(error, RuntimeError) and (of_onednn or any(each in said for each in words))


def available_bytes(device: torch.device) -> int:
    """Memory that is free to use on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_system_bytes("MemAvailable"), *(max(0, limit - used) for limit, used in _group_limits())])


def total_bytes(device: torch.device) -> int:
    """All memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([_system_bytes("MemTotal"), *(limit for limit, _ in _group_limits())])


def _system_bytes(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    # Not Linux: free memory is not told there, so half of what is installed stands for it.
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return installed if name == "MemTotal" else installed // 2


def _group_limits() -> list[tuple[int, int]]:
    """What /proc/meminfo does not know of: limits of the groups that this process is in, and what is used of each.

    Files in the page cache are not used memory: the kernel drops them for whoever asks for more.
    """
    try:
        memberships = [line.split(":", 2) for line in _MEMBERSHIPS.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in memberships:
        if not controllers:
            root, names, cached = _CGROUP, ("memory.max", "memory.current"), ("active_file", "inactive_file")
        elif "memory" in controllers.split(","):  # version 1
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cached = "total_active_file", "total_inactive_file"
        else:
            continue
        group = root / path.strip("/")
        # In a container the root may be this process's group already, and the path one of the host's.
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            with suppress(OSError, ValueError):  # no such group here, or no limit
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
                lines = map(str.split, (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                found.append((limit, max(0, used - sum(int(value) for name, value in lines if name in cached))))
    return found


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt, in bytes."""


def keep_freed_memory() -> None:
    """Has glibc keep what this process frees, for the next image, instead of giving it back to the system.

    Memory that comes anew has to be faulted in page by page. Blocks of more than 32 MiB still go back at once. Does
    nothing where the C library is another one. Measured in docs/decisions/0004.
    """
    _set_malloc({_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 32 << 20})


def return_freed_memory() -> None:
    """Has glibc give every block of more than 128 KiB back to the system when it is freed.

    By itself it keeps ever larger ones, up to 32 MiB. For tables that come and go once; networks take twice as long so.
    Does nothing where the C library is another one.
    """
    _set_malloc({_MMAP_THRESHOLD: 128 << 10})


def _set_malloc(options: dict[int, int]) -> None:
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for option, size in options.items():
            mallopt(option, size)
