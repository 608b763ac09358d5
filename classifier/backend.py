"""What the backends of the classifier share: from calibrated probabilities to predictions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from classifier.base import Prediction
from classifier.labels import Degradation
from classifier.sigma import estimate_sigma


class Backend(ABC):
    """Implements `classifier.base.Classifier` on the probabilities of a network."""

    name: str
    sha256: str
    thresholds: Mapping[Degradation, float]
    """The probability below which a label is not sure."""

    @abstractmethod
    def probabilities(self, image: NDArray[np.uint8]) -> dict[Degradation, float]:
        """Calibrated probabilities of one H x W x 3 uint8 RGB image.

        Raises:
            ValueError: the array has another shape or type.
        """

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Classifies H x W x 3 uint8 RGB images of any size from 1 x 1 up, each by itself.

        A prediction never depends, not even in its last digit, on the images beside it.

        Raises:
            ValueError: an array has another shape or type.
        """
        return [self._predict_one(image) for image in images]

    def _predict_one(self, image: NDArray[np.uint8]) -> Prediction:
        probability = self.probabilities(image)
        second, label = sorted(probability, key=probability.__getitem__)[-2:]
        return Prediction(
            label=label,
            confidence=probability[label],
            margin=probability[label] - probability[second],
            confident=probability[label] >= self.thresholds[label],
            probabilities=probability,
            noise_sigma_255=estimate_sigma(image),
        )
