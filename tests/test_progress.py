import io

import pytest
from rich.console import Console
from tiny_runs import outcome_of

from jobs import progress
from jobs.progress import ProgressView
from pipeline.records import ImageRef, Status

OUTCOMES = [outcome_of(ImageRef("1f", "a.png", "file:///a.png", 1, None), "00000", status) for status in Status]


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
