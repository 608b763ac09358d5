"""What a classifier is to the rest of the project."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from classifier.labels import Degradation
from classifier.view import Views


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image.

    `confidence` is the calibrated probability of `label`, `margin` its lead over the next label.
    `confident` is False when the probability is below the label's threshold: the pipeline then abstains.
    `noise_sigma_255` is the estimated standard deviation of noise on the 0..255 scale, whatever the label.
    """

    label: Degradation
    confidence: float
    margin: float
    confident: bool
    probabilities: Mapping[Degradation, float]
    noise_sigma_255: float


class Classifier(Protocol):
    """Images in, one prediction each out, in the same order.

    A pipeline does the same in parts: views are taken in any thread, probabilities are those of many images at once.
    """

    name: str
    sha256: str
    """Of the weights file; part of a run's configuration."""

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Classifies H x W x 3 uint8 RGB images of any size from 1 x 1 up."""
        ...

    def take_views(self, image: NDArray[np.uint8]) -> Views:
        """What is looked at of an image, a small part of its pixels; may be called from many threads."""
        ...

    def probabilities(self, views: Sequence[Views]) -> Sequence[Mapping[Degradation, float]]:
        """Those of each image; called from one thread at a time."""
        ...

    def prediction(self, probabilities: Mapping[Degradation, float], *, noise_sigma_255: float) -> Prediction:
        """What follows from an image's probabilities and the noise in it."""
        ...
