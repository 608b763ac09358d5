"""What the backends of the classifier share: from an image to its views, and from probabilities to predictions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from classifier.base import Prediction
from classifier.labels import Degradation
from classifier.sigma import estimate_sigma
from classifier.view import Views, ViewSettings, take_views


class Backend(ABC):
    """Implements `classifier.base.Classifier` on the probabilities of a network."""

    name: str
    sha256: str
    view: ViewSettings
    thresholds: Mapping[Degradation, float]
    """The probability below which a label is not sure."""

    @abstractmethod
    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        """Calibrated probabilities of each image; never depend, not even in the last digit, on those beside it."""

    def take_views(self, image: NDArray[np.uint8]) -> Views:
        """The views of one H x W x 3 uint8 RGB image of any size from 1 x 1 up.

        Raises:
            ValueError: the array has another shape or type.
        """
        return take_views(image, self.view)

    def prediction(self, probabilities: Mapping[Degradation, float], *, noise_sigma_255: float) -> Prediction:
        """What follows from an image's probabilities and the noise in it."""
        second, label = sorted(probabilities, key=probabilities.__getitem__)[-2:]
        return Prediction(
            label=label,
            confidence=probabilities[label],
            margin=probabilities[label] - probabilities[second],
            confident=probabilities[label] >= self.thresholds[label],
            probabilities=probabilities,
            noise_sigma_255=noise_sigma_255,
        )

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Classifies H x W x 3 uint8 RGB images of any size from 1 x 1 up, each by itself.

        Raises:
            ValueError: an array has another shape or type.
        """
        found = self.probabilities([self.take_views(image) for image in images])
        return [
            self.prediction(probability, noise_sigma_255=estimate_sigma(image))
            for probability, image in zip(found, images, strict=True)
        ]
