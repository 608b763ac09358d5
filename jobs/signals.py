"""An orderly end on SIGINT, SIGTERM and SIGHUP."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
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


_raised: list[int] | None = None
"""Within `signals_raise`, those for which an exception was raised: what runs at a fork may lose it to Python."""


def interrupt(number: int, frame: FrameType | None) -> None:
    """What SIGINT does as long as nothing else is arranged: KeyboardInterrupt, but for `end_if_importing`."""
    end_if_importing(number, frame)
    _note(number)
    raise KeyboardInterrupt


def _note(number: int) -> None:
    if _raised is not None:
        _raised.append(number)


class StopRequest:
    """Whether the run has been asked to end, and by which signal."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While open, the first SIGINT, SIGTERM or SIGHUP asks for an orderly end; a second one acts as usual.

    So does one before, within `signals_raise`, whose exception got lost. A SIGHUP that is ignored, as `nohup` has it,
    stays so.

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

    if _raised:
        request.signal_number = _raised.pop()
        _raised.clear()
    for number in numbers:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number in numbers:
            signal.signal(number, before[number])


class _EndedError(BaseException):
    """Not to be taken for a fault of what was being done."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@contextmanager
def signals_raise(*, goes_on: bool = True) -> Iterator[None]:
    """While open, SIGTERM or SIGHUP ends what is being done and raises InterruptedBySignalError.

    In the main thread alone. A SIGHUP that is ignored stays so.

    Args:
        goes_on: whether the same command does not begin anew.
    """
    global _raised
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        end_if_importing(number, frame)
        _note(number)
        raise _EndedError(number)

    _raised = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    except _EndedError as error:
        raise InterruptedBySignalError(error.signal_number, goes_on=goes_on) from None
    finally:
        _raised = None
        for number, handler in before.items():
            signal.signal(number, handler)


OF_DRIVER = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""Signals that reach a whole process group, and of which only the driver decides what they mean."""


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started while this is open have these signals blocked until they allow them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_DRIVER)
    try:
        resource_tracker.ensure_running()  # which unblocks two of them, as would the first process that starts it
        signal.pthread_sigmask(signal.SIG_BLOCK, OF_DRIVER)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_interrupts_to_parent(worker: int) -> None:
    """For processes that make samples ahead: a terminal's signals reach them, but the training needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
