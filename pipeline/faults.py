"""The hook by which tests stop a run at an exact step. It does nothing unless `DFPIR_FAULT` is set.

`DFPIR_FAULT` is `ACTION:POINT` or `ACTION:POINT:DETAIL`; without a detail every pass of the point counts.

Actions: `kill` ends the process with SIGKILL; `stall` writes the process id into the file that
`DFPIR_FAULT_MARKER` names and sleeps until the process is killed; `raise` raises `RuntimeError`; `exhaust`
raises `MemoryError`; `fill` raises the `OSError` of a full disk.

Points, in the order of an image's way, and their details:

| point | where | detail |
|---|---|---|
| `start` | a worker starts, before it loads weights | worker id |
| `decode` | before an image is decoded | relative path |
| `restore` | before a batch is restored, once for each of its images | relative path |
| `before-rename` | a file is written under its temporary name | final file name |
| `after-image` | an image has its name, its row is not in the manifest yet | relative path |
| `after-part` | a manifest part has its name | shard id |
"""

import errno
import os
import signal
import time
from pathlib import Path

FAULT = "DFPIR_FAULT"
MARKER = "DFPIR_FAULT_MARKER"


def fault_point(point: str, detail: str) -> None:
    """Acts if `DFPIR_FAULT` names this point and detail."""
    spec = os.environ.get(FAULT)
    if not spec:
        return
    action, _, place = spec.partition(":")
    if place not in (point, f"{point}:{detail}"):
        return
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stall":
            Path(os.environ[MARKER]).write_text(str(os.getpid()))
            while True:
                time.sleep(60)
        case "raise":
            raise RuntimeError(f"fault asked for at {place}")
        case "exhaust":
            raise MemoryError(f"fault asked for at {place}")
        case "fill":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case _:
            raise ValueError(f"{FAULT}={spec!r}: the action must be kill, stall, raise, exhaust or fill")


def fault_environment() -> dict[str, str]:
    """The hook's variables where set, for processes that do not inherit this one's environment."""
    return {name: os.environ[name] for name in (FAULT, MARKER) if name in os.environ}
