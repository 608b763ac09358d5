import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jobs.dispatcher import Assignment
from jobs.errors import InterruptedBySignalError
from jobs.runner import note_traceback, work_off
from jobs.signals import OF_DRIVER, interrupt, kept_from_children, signals_raise, stop_on_signals
from pipeline.item import SourceGoneError
from pipeline.records import Shard


def test_the_first_signal_asks_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def default_hangup() -> Iterator[None]:
    """The tests may run under `nohup` themselves."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_not_taken_for_a_fault_of_what_it_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(InterruptedBySignalError, match=f"ended by {number.name}"), signals_raise():  # noqa: PT012
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except Exception:
            pytest.fail("it was taken for one")
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("default_hangup")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it is what is tested
@pytest.mark.parametrize("number", OF_DRIVER)
def test_a_signal_whose_exception_is_lost_asks_for_an_orderly_end(number: signal.Signals) -> None:
    """Python drops one that comes while it runs what is registered to be done at a fork."""
    before = signal.signal(signal.SIGINT, interrupt)
    reached: list[str] = []

    def at_fork() -> None:
        if not reached:
            reached.append("fork")
            signal.raise_signal(number)

    os.register_at_fork(after_in_parent=at_fork)
    try:
        with signals_raise():
            subprocess.run([sys.executable, "-c", ""], preexec_fn=os.getpid, check=True)
            assert reached
            with stop_on_signals() as request:
                assert request.signal_number == number
            with stop_on_signals() as request:
                assert not request
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_hangup")
def test_a_signal_that_comes_with_the_handlers_is_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    set_handler, calls = signal.signal, []

    def then_signal(number: int, handler: Any) -> Any:
        before = set_handler(number, handler)
        calls.append(number)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return before

    monkeypatch.setattr(signal, "signal", then_signal)
    with stop_on_signals() as request:
        assert request.signal_number == signal.SIGINT


def test_a_signal_before_is_no_request_to_a_later_command() -> None:
    for before in (nullcontext(), signals_raise()):
        with pytest.raises(KeyboardInterrupt), before:
            interrupt(signal.SIGINT, None)
        with stop_on_signals() as request:
            assert not request
        with signals_raise(), stop_on_signals() as request:
            assert not request


def test_signals_of_the_process_group_wait_until_a_child_is_ready_for_them() -> None:
    script = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"

    def blocked() -> str:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    usual = blocked()
    with kept_from_children():
        kept = blocked()
    assert all(repr(number) in kept for number in OF_DRIVER)
    assert blocked() == usual


def test_signals_are_let_through_again_where_no_child_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    monkeypatch.setattr("multiprocessing.resource_tracker.ensure_running", fail)
    with pytest.raises(BlockingIOError), kept_from_children():
        pytest.fail("it can")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_log_may_be_written_by_whoever_may_write_the_run(tmp_path: Path) -> None:
    """In the shared folder of a group another of its users may go on with it."""
    code = "import os, sys; from pathlib import Path; from jobs.runner import log_to; os.umask(0o002); "
    subprocess.run([sys.executable, "-c", f"{code}log_to(Path(sys.argv[1]))", tmp_path / "log"], check=True)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o664


def test_a_log_on_a_full_disk_does_not_hide_what_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Full:
        def write(self, text: str) -> None:
            written.append(text)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    try:
        raise RuntimeError("what is at fault")
    except RuntimeError:
        note_traceback()
    assert written


@pytest.mark.usefixtures("default_hangup")
def test_a_lost_terminal_asks_for_an_orderly_end_unless_it_is_ignored() -> None:
    with stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal_number == signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_raise(), stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request


def test_a_fault_that_names_a_file_is_fit_for_a_terminal() -> None:
    """It is logged there, and breaks a run off."""

    def fail(*_: object, **__: object) -> None:
        raise SourceGoneError("the folder of a\x1b[31m.png is gone")

    worker: Any = fail
    ending = work_off(worker, Assignment(Shard("00000", ()), 1, (0, None)), lambda _: None)
    assert ending == ("failed", "SourceGoneError: the folder of a\\x1b[31m.png is gone")
