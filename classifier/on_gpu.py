"""The network on a GPU: one CUDA graph for several images at once."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from classifier.network import DegradationNetwork, to_input
from classifier.view import Views, ViewSettings

TOGETHER = 16
"""Images in the graph, all of which are computed however few are asked about."""


class NetworkOnGpu:
    """Logits of images, `TOGETHER` of them at a time. One call at a time: the graph has one place for its inputs."""

    def __init__(self, network: DegradationNetwork, view: ViewSettings, device: torch.device) -> None:
        sizes = (view.crops, view.crop_px, view.crop_px, 3), (view.thumbnail_px, view.thumbnail_px, 3)
        # Page-locked, so that a call waits for the GPU once, for its logits.
        self._here = [torch.zeros(TOGETHER, *size, dtype=torch.uint8).pin_memory() for size in sizes]
        self._there = [each.to(device) for each in self._here]
        self._run: Callable[..., Any] = self._recorded(network, device)
        self._most = TOGETHER
        if not self._is_each_by_itself():
            warnings.warn("classifier: images go one by one, which is slower: logits differ among others", stacklevel=3)
            self._most = 1

    def _recorded(self, network: DegradationNetwork, device: torch.device) -> Callable[..., Any]:
        try:
            with torch.cuda.device(device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                samples = tuple(to_input(each) for each in self._there)
                return torch.cuda.make_graphed_callables(copy.copy(network), samples)
        except RuntimeError as error:
            warnings.warn(f"classifier: CUDA graphs are not used, which is slower: {error}", stacklevel=4)
            return network

    def _is_each_by_itself(self) -> bool:
        """Whether an image's logits are the same to the last digit among others, wherever it stands."""
        rng = np.random.default_rng(0)
        shapes = [each.shape[1:] for each in self._here]
        views = [Views(*(rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes)) for _ in range(TOGETHER)]
        return all(np.array_equal(self([one])[0], found) for one, found in zip(views, self(views), strict=True))

    def __call__(self, views: Sequence[Views]) -> list[NDArray[np.float64]]:
        """Float64 logits of each."""
        groups = (views[first : first + self._most] for first in range(0, len(views), self._most))
        return [logits for group in groups for logits in self._together(group)]

    @torch.inference_mode()
    def _together(self, views: Sequence[Views]) -> NDArray[np.float64]:
        for place, each in enumerate(views):
            for here, pixels in zip(self._here, (each.crops, each.thumbnail), strict=True):
                np.copyto(here[place].numpy(), pixels)
        for there, here in zip(self._there, self._here, strict=True):
            there.copy_(here, non_blocking=True)
        logits: NDArray[np.float64] = self._run(*map(to_input, self._there))[: len(views)].double().cpu().numpy()
        return logits
