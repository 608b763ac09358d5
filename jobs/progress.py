"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere. All on stderr."""

import math
import time
from collections import Counter
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.records import Outcome, Status

PLAIN_EVERY_S = 10.0


class ProgressView:
    """Counts images as their outcomes come in; use as a context manager and call it with outcomes."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self._console, self._total, self._done = console, total, done
        self._counts: Counter[str] = Counter()
        self._last_line = time.monotonic()
        self._told = -1
        self._bar: Progress | None = None
        if console.is_terminal and not console.is_dumb_terminal:  # which could not move a bar
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[failed]}"), console=console,
                speed_estimate_period=math.inf,  # large images come minutes apart
            )  # fmt: skip
            self._task = self._bar.add_task("images", total=total, completed=done - 1, failed="")
            self._bar.update(self._task, completed=done)  # rich counts images from its first update on, without that

    def __enter__(self) -> "ProgressView":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *fault: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._told != self._counts.total():
            self._line()

    def __call__(self, outcomes: list[Outcome]) -> None:
        """Counts finished images."""
        self._done += len(outcomes)
        self._counts.update(str(outcome.status) for outcome in outcomes)
        failed = self._counts[Status.FAILED] + self._counts[Status.QUARANTINED]
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, failed=f"[red]{failed} failed" if failed else "")
        elif time.monotonic() - self._last_line >= PLAIN_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._last_line, self._told = time.monotonic(), self._counts.total()
        parts = ", ".join(f"{count} {status}" for status, count in sorted(self._counts.items()))
        with suppress(OSError):  # a full disk, a terminal that is gone: no reason to stop
            self._console.print(
                f"{time.strftime('%H:%M:%S')} {self._done} of {self._total} images ({parts or 'none in this call'})",
                soft_wrap=True,
            )
