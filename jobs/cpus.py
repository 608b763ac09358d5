"""How many CPUs there are for this process."""

import os
from contextlib import suppress
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""Of a container, as it is seen from within."""

_QUOTAS = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
"""Files with CPU time and the time in which it may be used, of the second version of groups and of the first."""


def bound_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cpus() -> int:
    """Those, or as many as a container has the time of."""
    cpus = bound_cpus()
    for files in _QUOTAS:
        with suppress(OSError, ValueError):  # no such group, or no limit
            quota, period = (int(word) for file in files for word in (GROUP / file).read_text("ascii").split())
            if quota > 0:
                cpus = min(cpus, max(1, -(-quota // period)))
    return cpus
