"""Errors of the classifier."""


class ClassifierWeightsError(Exception):
    """The weights cannot be used; the message names the file, what was expected, what was found and what to do."""
