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

TOGETHER = 8
"""Images in the graph, whose hundred small kernels take little longer than for one; also if fewer are asked about."""


class NetworkOnGpu:
    """Logits of up to `TOGETHER` images, on a stream of its own, so that they need not wait for what restores.

    One call at a time: the graph has one place for its inputs.
    """

    def __init__(self, network: DegradationNetwork, view: ViewSettings, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        sizes = (view.crops, view.crop_px, view.crop_px, 3), (view.thumbnail_px, view.thumbnail_px, 3)
        # Page-locked, so that a call waits for the GPU once, for its logits.
        self._here = [torch.zeros(TOGETHER, *size, dtype=torch.uint8).pin_memory() for size in sizes]
        self._there = [each.to(device) for each in self._here]
        self._run: Callable[..., Any] = self._recorded(network, device)
        self.most = TOGETHER
        """Images that a call may ask about."""
        if not self._is_each_by_itself():
            warnings.warn("classifier: images go one by one, which is slower: logits differ among others", stacklevel=3)
            self.most = 1

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

    @torch.inference_mode()
    def __call__(self, views: Sequence[Views]) -> list[NDArray[np.float64]]:
        """Float64 logits of each."""
        for place, each in enumerate(views):
            for here, pixels in zip(self._here, (each.crops, each.thumbnail), strict=True):
                np.copyto(here[place].numpy(), pixels)
        with torch.cuda.stream(self._stream):
            for there, here in zip(self._there, self._here, strict=True):
                there.copy_(here, non_blocking=True)
            logits = self._run(*map(to_input, self._there))[: len(views)].double().cpu()
        return list(logits.numpy())
