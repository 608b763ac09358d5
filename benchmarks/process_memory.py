"""What a process holds in memory, from Linux's /proc."""

from collections.abc import Callable
from pathlib import Path


def resident_bytes(field: str, pid: int | str = "self") -> int:
    """Memory of a process: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_bytes(work: Callable[[], object]) -> int:
    """What a call takes at its peak, beyond what this process holds before it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before
