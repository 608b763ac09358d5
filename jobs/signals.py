"""An orderly end on SIGINT, SIGTERM and SIGHUP."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jobs.errors import InterruptedBySignalError


def end_if_importing(number: int, frame: FrameType | None) -> None:
    """Ends the process where the signal has come during an import.

    An exception there may look to a library like a part that is missing, or end the process in its own way.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
            os.write(2, f"dfpir: {how}\n".encode())
            os._exit(128 + number)
        frame = frame.f_back


def interrupt(number: int, frame: FrameType | None) -> None:
    """What SIGINT does as long as nothing else is arranged: KeyboardInterrupt, but for `end_if_importing`."""
    end_if_importing(number, frame)
    raise KeyboardInterrupt


class StopRequest:
    """Whether the run has been asked to end, and by which signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While open, the first SIGINT, SIGTERM or SIGHUP asks for an orderly end; a second one acts as usual.

    A SIGHUP that is ignored, as `nohup` has it, stays so.

    Outside the main thread, where Python allows no handlers, signals keep their meaning.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}
    numbers = [number for number in signals if number != signal.SIGHUP or before[number] is not signal.SIG_IGN]

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        for each in numbers:
            signal.signal(each, before[each])

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in numbers:
            signal.signal(number, before[number])


class _EndedError(BaseException):
    """Not to be taken for a fault of what was being done."""


@contextmanager
def sigterm_raises(*, goes_on: bool = True) -> Iterator[None]:
    """While open, SIGTERM ends what is being done and raises InterruptedBySignalError, in the main thread alone.

    `goes_on`: whether the same command does not begin anew.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        end_if_importing(number, frame)
        raise _EndedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _EndedError:
        raise InterruptedBySignalError(signal.SIGTERM, goes_on=goes_on) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_interrupts_to_parent(worker: int) -> None:
    """For processes that make samples ahead: a terminal's Ctrl-C reaches them, but the training needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
