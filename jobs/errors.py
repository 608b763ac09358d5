"""Faults of a command."""


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to do. Exit code 2."""


class TrainingError(Exception):
    """A training cannot go on; the message says at which step and with what it was. Exit code 1."""
