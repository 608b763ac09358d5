"""Faults of a command."""

import signal


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to do. Exit code 2."""


class TrainingError(Exception):
    """A training cannot go on; the message says at which step and with what it was. Exit code 1."""


class RunError(Exception):
    """The run cannot go on; what is committed stays, and the same command resumes it. Exit code 1."""


class InterruptedBySignalError(Exception):
    """A signal asked for the end: what was done is committed, or in a checkpoint. Exit code 128 + its number."""

    def __init__(self, signal_number: int, *, goes_on: bool = True) -> None:
        """`goes_on`: whether the same command does not begin anew."""
        super().__init__(signal_number)  # with which another process makes it anew
        self.signal_number = signal_number
        self.goes_on = goes_on

    def __str__(self) -> str:
        then = "; the same command goes on from here" if self.goes_on else ""
        return f"ended by {signal.Signals(self.signal_number).name}{then}"
