import errno
import os
import signal
import sys
import time

import pytest

from jobs.errors import InterruptedBySignalError
from jobs.runner import note_traceback
from jobs.signals import sigterm_raises, stop_on_signals


def test_the_first_signal_asks_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_is_not_taken_for_a_fault_of_what_it_ends() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedBySignalError, match="ended by SIGTERM"), sigterm_raises():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception:
            pytest.fail("it was taken for one")
    assert signal.getsignal(signal.SIGTERM) == before


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


def test_a_lost_terminal_asks_for_an_orderly_end_unless_it_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under `nohup` themselves
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal_number == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request
    finally:
        signal.signal(signal.SIGHUP, before)
