"""The shipped backend: a small timm network that sees native crops and a thumbnail."""

import numpy as np
import torch
from numpy.typing import NDArray

from classifier.backend import Backend
from classifier.calibration import probabilities
from classifier.labels import LABELS, Degradation
from classifier.network import inference_form, to_input
from classifier.view import take_views
from classifier.weights import ClassifierWeights


class TimmClassifier(Backend):
    """`name` and `sha256` are those of the weights file."""

    def __init__(self, weights: ClassifierWeights, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.name = weights.name
        self.sha256 = weights.sha256
        self.thresholds = weights.thresholds
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

    def probabilities(self, image: NDArray[np.uint8]) -> dict[Degradation, float]:
        """See `Backend.probabilities`."""
        values = probabilities(self._logits(image), self.weights.temperature)
        return {label: float(value) for label, value in zip(LABELS, values, strict=True)}
