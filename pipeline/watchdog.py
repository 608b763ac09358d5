"""Ends a worker that makes no headway: a decoder or a file system that hangs would hold up its run for ever."""

import faulthandler
import time

SECONDS_PER_MEGAPIXEL = 1200.0
"""Time that restoring may take beside the patience: fifty times that of the published size in float32 on two cores.

A processor that emulates bfloat16, or shares its cores, takes many times as long.
"""

UNNOTICED = 0.01
"""Share of the patience that may be missing: setting the timer anew starts a thread, which images by the hundred per
second need not do each."""

LOG = 2
"""The file descriptor of stderr, which is a worker's log."""


class Watchdog:
    """Kills this process, the tracebacks of its threads in its log, once nothing has come of it for too long.

    Its timer is a thread of the standard library's `faulthandler`, which needs no lock that a hanging thread may hold.
    To the run it is a death like others: the image in hand is tried twice more, alone, then quarantined. There is one
    timer in a process, and time for which the process is stopped counts.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._ends_at = 0.0

    def __enter__(self) -> "Watchdog":
        self.headway()
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._ends_at = 0.0

    def headway(self, *, pixels: int = 0) -> None:
        """Begins to wait anew, the longer the more pixels are to be restored next."""
        allowed_s = self._patience_s + SECONDS_PER_MEGAPIXEL * pixels / 1e6
        ends_at = time.monotonic() + allowed_s
        if not 0 <= ends_at - self._ends_at < UNNOTICED * self._patience_s:
            faulthandler.dump_traceback_later(allowed_s, exit=True, file=LOG)
            self._ends_at = ends_at
