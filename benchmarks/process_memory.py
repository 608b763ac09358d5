"""What a process holds in memory, from Linux's /proc."""

from pathlib import Path


def resident_bytes(field: str, pid: int | str = "self") -> int:
    """Memory of a process: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
