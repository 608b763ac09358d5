import errno
import io
import os
from datetime import timedelta

import pytest
from rich.console import Console
from tiny_runs import outcome_of

import jobs.terminal
from jobs import progress
from jobs.progress import ProgressView
from jobs.terminal import waiting
from pipeline.records import ImageRef, Status

OUTCOMES = [outcome_of(ImageRef("1f", "a.png", "file:///a.png", 1, None), "00000", status) for status in Status]


@pytest.fixture(autouse=True)
def _whole_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def shown(console: Console, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are there before the end."""
    assert isinstance(console.file, io.StringIO)
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    with ProgressView(console, total=1_000_000, done=900_000) as view:
        view(OUTCOMES * 10_000)
        return console.file.getvalue().splitlines()


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "dumb terminal"])
def test_where_a_bar_cannot_move_there_are_lines_of_which_each_is_whole(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    lines = shown(Console(file=io.StringIO(), width=80, force_terminal=terminal), monkeypatch)
    assert len(lines) == 1
    assert lines[0].endswith(
        "950000 of 1000000 images (10000 abstained, 10000 copied, 10000 failed, 10000 quarantined, 10000 restored)"
    )


@pytest.mark.parametrize(("apart_s", "at_once"), [(80.0, 1), (20.0, 8)])
def test_the_time_left_is_told_of_images_that_come_minutes_apart_and_of_several_at_once(
    apart_s: float, at_once: int
) -> None:
    clock = 0.0
    console = Console(file=io.StringIO(), width=80, force_terminal=True, get_time=lambda: clock)
    view = ProgressView(console, total=1000, done=100)
    assert view._bar is not None
    column, task = view._bar.columns[4], view._bar.tasks[0]
    for turn in range(1, 4):
        clock = turn * apart_s
        for _ in range(at_once):  # as a local worker tells of them
            view(OUTCOMES[:1])
        column._renderable_cache.clear()
        assert str(column(task)) == str(timedelta(seconds=apart_s / at_once * (900 - turn * at_once)))


def test_the_last_line_is_not_told_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80)
    assert len(shown(console, monkeypatch)) == 1
    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 1  # at the end, too
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 1000.0)
    with ProgressView(console, total=10, done=10):
        pass
    assert console.file.getvalue().endswith(" 10 of 10 images (none in this call)\n")


class Broken(io.StringIO):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_lines_that_nobody_can_take_end_no_run(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a `tee` that the same Ctrl-C has ended: workers that finish what they have in hand would be killed."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    console = type(jobs.terminal.messages)(file=Broken(number), width=80)
    with ProgressView(console, total=10, done=0) as view:
        view(OUTCOMES)
        view(OUTCOMES)
    assert view._done == 2 * len(OUTCOMES)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_says_what_takes_long_and_a_file_does_not(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(jobs.terminal, "messages", Console(file=written, force_terminal=terminal))
    with waiting("listing SRC"):
        pass
    assert ("listing SRC" in written.getvalue()) is terminal
    assert terminal or not written.getvalue()
