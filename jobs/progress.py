"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere. All on stderr."""

import time
from collections import Counter
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipeline.records import Outcome, Status

PLAIN_EVERY_S = 10.0


class _TimeLeft(ProgressColumn):
    """By the mean since the call began, as images come in several at once, and large ones minutes apart."""

    def render(self, task: Task) -> Text:
        """The time left, counted down between images."""
        if task.fields["ends_at"] is None:
            return Text("-:--:--", style="progress.remaining")
        left_s = max(0, round(task.fields["ends_at"] - task.get_time()))
        return Text(str(timedelta(seconds=left_s)), style="progress.remaining")


class ProgressView:
    """Counts images as their outcomes come in; use as a context manager and call it with outcomes."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self._console, self._total, self._done = console, total, done
        self._counts: Counter[str] = Counter()
        self._began = console.get_time()
        self._last_line = time.monotonic()
        self._told = -1
        self._bar: Progress | None = None
        if (
            console.is_terminal and not console.is_dumb_terminal
        ):  # one without cursor movement has a bar at the end only
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
                TimeElapsedColumn(), _TimeLeft(), TextColumn("{task.fields[failed]}"), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("images", total=total, completed=done, failed="", ends_at=None)

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
            now = self._console.get_time()
            ends_at = now + (now - self._began) * (self._total - self._done) / max(1, self._counts.total())
            self._bar.update(
                self._task, completed=self._done, failed=f"[red]{failed} failed" if failed else "", ends_at=ends_at
            )
        elif time.monotonic() - self._last_line >= PLAIN_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._last_line, self._told = time.monotonic(), self._counts.total()
        parts = ", ".join(f"{count} {status}" for status, count in sorted(self._counts.items()))
        self._console.print(
            f"{time.strftime('%H:%M:%S')} {self._done} of {self._total} images ({parts or 'none in this call'})",
            soft_wrap=True,
        )
