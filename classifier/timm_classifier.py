"""The shipped backend: a small timm network that sees native crops and a thumbnail."""

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

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
        self._lock = threading.Lock()
        on_gpu = self.device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._run: Callable[..., Any] = self._recorded() if on_gpu else self.network

    def _recorded(self) -> Callable[..., Any]:
        """The network as one CUDA graph: launching its hundred small kernels takes longer than they do."""
        view = self.weights.view
        crops = torch.zeros(view.crops, view.crop_px, view.crop_px, 3, dtype=torch.uint8, device=self.device)
        thumbnail = torch.zeros(view.thumbnail_px, view.thumbnail_px, 3, dtype=torch.uint8, device=self.device)
        try:
            with torch.cuda.device(self.device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                samples = to_input(crops)[None], to_input(thumbnail)[None]
                return torch.cuda.make_graphed_callables(copy.copy(self.network), samples)
        except RuntimeError as error:
            warnings.warn(f"classifier: CUDA graphs are not used, which is slower: {error}", stacklevel=3)
            return self.network

    @torch.inference_mode()
    def _logits(self, image: NDArray[np.uint8]) -> NDArray[np.float64]:
        views = take_views(image, self.weights.view)
        # A graph has one place for its inputs; on a stream of its own it need not wait for what restores.
        with self._lock, torch.cuda.stream(self._stream):
            crops = torch.from_numpy(views.crops).to(self.device)
            thumbnail = torch.from_numpy(views.thumbnail.copy()).to(self.device)
            logits = self._run(to_input(crops)[None], to_input(thumbnail)[None])[0].double().cpu()
        found: NDArray[np.float64] = logits.numpy()
        return found

    def probabilities(self, image: NDArray[np.uint8]) -> dict[Degradation, float]:
        """See `Backend.probabilities`."""
        values = probabilities(self._logits(image), self.weights.temperature)
        return {label: float(value) for label, value in zip(LABELS, values, strict=True)}
