"""The shipped backend: a small timm network that sees native crops and a thumbnail."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
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
        self._several = GroupedNetwork(self.network, weights.view, self.device)
        if self.device.type == "cuda":
            _ = self._single  # while a CUDA graph is recorded no other thread may use the GPU, which one may later

    @cached_property
    def _single(self) -> GroupedNetwork:
        """For images of one crop: as many of the same would give the same, at twice the cost."""
        return GroupedNetwork(self.network, replace(self.view, crops=1), self.device)

    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        """See `Classifier.probabilities`."""
        logits = [np.empty(0)] * len(views)
        for is_single in (False, True):
            places = [place for place, each in enumerate(views) if (len(each.crops) == 1) is is_single]
            if places:
                network = self._single if is_single else self._several
                for place, found in zip(places, network([views[place] for place in places]), strict=True):
                    logits[place] = found
        return [label_probabilities(each, self.weights.temperature) for each in logits]
