"""Errors of the models package: `WeightsError` is the only one that it defines.

It stands for every fault of a weights file, of its description, or of a model's name. Its message says what
was expected, what was found, in which file, and what to do.
"""


class WeightsError(Exception):
    """Weights that cannot be trusted or found; stops a run before the first image."""
