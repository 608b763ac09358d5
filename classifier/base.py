"""What a classifier is to the rest of the project."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from classifier.labels import Degradation
from classifier.sigma import estimate_sigma
from classifier.view import Views, ViewSettings, take_views


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image.

    `confidence` is the calibrated probability of `label`, `margin` its lead over the next label.
    `threshold` is the probability from which the label is sure; below it the pipeline abstains.
    `noise_sigma_255` is the estimated standard deviation of noise on the 0..255 scale, whatever the label.
    """

    label: Degradation
    confidence: float
    margin: float
    threshold: float
    probabilities: Mapping[Degradation, float]
    noise_sigma_255: float

    @property
    def confident(self) -> bool:
        """Whether the label is sure."""
        return self.confidence >= self.threshold


class Classifier(ABC):
    """Images in, one prediction each out, in the same order.

    A pipeline does the same in parts: views are taken in any thread, probabilities are those of many images at once.
    """

    name: str
    sha256: str
    """Of the weights file; part of a run's configuration."""
    view: ViewSettings
    thresholds: Mapping[Degradation, float]
    """The probability below which a label is not sure."""

    @abstractmethod
    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        """Calibrated probabilities of each image; never depend, not even in the last digit, on those beside it.

        May be called from many threads; on a GPU they take turns.
        """

    def take_views(self, image: NDArray[np.uint8]) -> Views:
        """The views of one H x W x 3 uint8 RGB image of any size from 1 x 1 up; may be called from many threads.

        Raises:
            ValueError: this is no array, or one of another shape or type.
        """
        return take_views(image, self.view)

    def prediction(self, probabilities: Mapping[Degradation, float], *, noise_sigma_255: float) -> Prediction:
        """What follows from an image's probabilities and the noise in it."""
        second, label = sorted(probabilities, key=probabilities.__getitem__)[-2:]
        return Prediction(
            label=label,
            confidence=probabilities[label],
            margin=probabilities[label] - probabilities[second],
            threshold=self.thresholds[label],
            probabilities=probabilities,
            noise_sigma_255=noise_sigma_255,
        )

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Classifies H x W x 3 uint8 RGB images of any size from 1 x 1 up, each by itself; from any thread.

        Raises:
            ValueError: one of them is no array, or has another shape or type.
        """
        found = self.probabilities([self.take_views(image) for image in images])
        return [
            self.prediction(probability, noise_sigma_255=estimate_sigma(image))
            for probability, image in zip(found, images, strict=True)
        ]
