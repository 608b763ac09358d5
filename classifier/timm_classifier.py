"""The shipped backend: a small timm network that sees native crops and a thumbnail."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from classifier.backend import Backend
from classifier.calibration import label_probabilities
from classifier.labels import Degradation
from classifier.network import inference_form, to_input
from classifier.on_gpu import NetworkOnGpu
from classifier.view import Views
from classifier.weights import ClassifierWeights


class TimmClassifier(Backend):
    """`name` and `sha256` are those of the weights file."""

    def __init__(self, weights: ClassifierWeights, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.name = weights.name
        self.sha256 = weights.sha256
        self.thresholds = weights.thresholds
        self.view = weights.view
        self.device = torch.device(device)
        self.network = inference_form(weights.network, dtype).to(self.device)
        self.weights = weights
        on_gpu = self.device.type == "cuda"
        self._logits = NetworkOnGpu(self.network, weights.view, self.device) if on_gpu else self._one_by_one

    @torch.inference_mode()
    def _one_by_one(self, views: Sequence[Views]) -> list[NDArray[np.float64]]:
        logits = []
        for each in views:
            crops, thumbnail = torch.from_numpy(each.crops), torch.from_numpy(each.thumbnail.copy())
            logits.append(self.network(to_input(crops)[None], to_input(thumbnail)[None])[0].double().numpy())
        return logits

    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        """See `Backend.probabilities`."""
        return [label_probabilities(logits, self.weights.temperature) for logits in self._logits(views)]
