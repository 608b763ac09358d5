"""Faults of a command."""

import signal


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to do. Exit code 2."""


class TrainingError(Exception):
    """A training cannot go on; the message says at which step and with what it was. Exit code 1."""


class TrainingInterruptedError(TrainingError):
    """SIGINT or SIGTERM: the checkpoint is of the last step, on Ray that of some minutes before."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"ended by {signal.Signals(signal_number).name}; the same command goes on from here")
        self.signal_number = signal_number
