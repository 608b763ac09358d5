"""The shipped backend: a small timm network that sees native crops and a thumbnail."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from classifier.backend import Backend
from classifier.calibration import probabilities
from classifier.labels import LABELS, Degradation
from classifier.network import inference_form, to_input
from classifier.on_gpu import NetworkOnGpu
from classifier.together import Together
from classifier.view import Views, take_views
from classifier.weights import ClassifierWeights


class TimmClassifier(Backend):
    """`name` and `sha256` are those of the weights file. On a GPU many threads may ask at once."""

    def __init__(self, weights: ClassifierWeights, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.name = weights.name
        self.sha256 = weights.sha256
        self.thresholds = weights.thresholds
        self.weights = weights
        self.device = torch.device(device)
        self.network = inference_form(weights.network, dtype).to(self.device)
        self._logits: Callable[[Views], NDArray[np.float64]] = self._logits_here
        if self.device.type == "cuda":
            there = NetworkOnGpu(self.network, weights.view, self.device)
            self._logits = Together(there, most=there.most)

    @torch.inference_mode()
    def _logits_here(self, views: Views) -> NDArray[np.float64]:
        crops, thumbnail = torch.from_numpy(views.crops), torch.from_numpy(views.thumbnail.copy())
        logits = self.network(to_input(crops)[None], to_input(thumbnail)[None])[0]
        found: NDArray[np.float64] = logits.double().numpy()
        return found

    def probabilities(self, image: NDArray[np.uint8]) -> dict[Degradation, float]:
        """See `Backend.probabilities`."""
        values = probabilities(self._logits(take_views(image, self.weights.view)), self.weights.temperature)
        return {label: float(value) for label, value in zip(LABELS, values, strict=True)}
