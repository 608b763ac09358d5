"""The shipped backend: a small timm network that sees native crops and a thumbnail."""

from collections.abc import Sequence

import torch

from classifier.base import Classifier
from classifier.calibration import label_probabilities
from classifier.grouped import GroupedNetwork
from classifier.labels import Degradation
from classifier.network import inference_form
from classifier.view import Views
from classifier.weights import ClassifierWeights


class TimmClassifier(Classifier):
    """`name` and `sha256` are those of the weights file."""

    def __init__(self, weights: ClassifierWeights, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.name = weights.name
        self.sha256 = weights.sha256
        self.thresholds = weights.thresholds
        self.view = weights.view
        self.device = torch.device(device)
        self.network = inference_form(weights.network, dtype).to(self.device)
        self.weights = weights
        self._logits = GroupedNetwork(self.network, weights.view, self.device)

    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        """See `Classifier.probabilities`."""
        return [label_probabilities(logits, self.weights.temperature) for logits in self._logits(views)]
