"""The shipped backend: a small timm network on native crops and a thumbnail."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from classifier.base import Prediction
from classifier.calibration import probabilities
from classifier.labels import LABELS, Degradation
from classifier.network import inference_form, to_input
from classifier.sigma import estimate_sigma
from classifier.view import take_views
from classifier.weights import ClassifierWeights, load_weights


class TimmClassifier:
    """Implements `classifier.base.Classifier`; `name` and `sha256` are those of the weights file."""

    def __init__(self, weights: ClassifierWeights, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.name = weights.name
        self.sha256 = weights.sha256
        self.weights = weights
        self.device = torch.device(device)
        self.network = inference_form(weights.network, dtype).to(self.device)

    @torch.inference_mode()
    def _logits(self, image: NDArray[np.uint8]) -> NDArray[np.float64]:
        views = take_views(image, self.weights.view)
        crops = to_input(torch.from_numpy(views.crops).to(self.device))[None]
        thumbnails = to_input(torch.from_numpy(views.thumbnail.copy()).to(self.device))[None]
        logits: NDArray[np.float64] = self.network(crops, thumbnails)[0].double().cpu().numpy()
        return logits

    def _predict_one(self, image: NDArray[np.uint8]) -> Prediction:
        probability = self.probabilities(image)
        second, label = sorted(probability, key=probability.__getitem__)[-2:]
        return Prediction(
            label=label,
            confidence=probability[label],
            margin=probability[label] - probability[second],
            confident=probability[label] >= self.weights.thresholds[label],
            probabilities=probability,
            noise_sigma_255=estimate_sigma(image),
        )

    def probabilities(self, image: NDArray[np.uint8]) -> dict[Degradation, float]:
        """Calibrated probabilities of one H x W x 3 uint8 RGB image.

        Raises:
            ValueError: the array has another shape or type.
        """
        values = probabilities(self._logits(image), self.weights.temperature)
        return {label: float(value) for label, value in zip(LABELS, values, strict=True)}

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        """Classifies H x W x 3 uint8 RGB images of any size from 1 x 1 up, each by itself.

        The views of one image are a batch of their own, so that a prediction never depends, not even in its last
        digit, on the images beside it.

        Raises:
            ValueError: an array has another shape or type.
        """
        return [self._predict_one(image) for image in images]


def load_classifier(
    name_or_path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> TimmClassifier:
    """The classifier of a shipped name or of a weights file, its backbones in `dtype`; nothing is downloaded.

    Raises:
        ClassifierWeightsError: see `classifier.weights.load_weights`.
    """
    return TimmClassifier(load_weights(name_or_path), device=device, dtype=dtype)
