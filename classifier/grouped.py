"""The network asked about several images at once: faster than about one at a time, and each answer its own."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classifier.network import DegradationNetwork, to_input
from classifier.view import Views, ViewSettings

TOGETHER = {"cpu": 8, "cuda": 32}
"""Images in a group, all of which are computed however few are asked about: kernels, and with them the last digits of
an image's logits, depend on the number of images."""


class GroupedNetwork:
    """Logits of images, some at a time. One call at a time: a group has one place for its inputs."""

    def __init__(self, network: DegradationNetwork, view: ViewSettings, device: torch.device) -> None:
        """`network` is on `device`; on a GPU a group is one CUDA graph."""
        self._network, self._device = network, device
        self._view = view
        self._prepare(TOGETHER[device.type])
        if not self._is_each_by_itself():
            warnings.warn("classifier: images go one by one, which is slower: logits differ among others", stacklevel=3)
            self._prepare(1)

    def _prepare(self, together: int) -> None:
        crop_px, thumbnail_px = self._view.crop_px, self._view.thumbnail_px
        here = [
            torch.zeros(together, self._view.crops, crop_px, crop_px, 3, dtype=torch.uint8),
            torch.zeros(together, thumbnail_px, thumbnail_px, 3, dtype=torch.uint8),
            torch.zeros(together, dtype=torch.bool),
        ]
        on_gpu = self._device.type == "cuda"
        # Page-locked, so that a call waits for the GPU once, for its logits.
        self._here = [each.pin_memory() for each in here] if on_gpu else here
        self._there = [each.to(self._device) for each in self._here]  # on a CPU the same
        self._run: Callable[..., Any] = self._recorded() if on_gpu else self._network

    def _inputs(self) -> tuple[Tensor, ...]:
        crops, thumbnails, small = self._there
        return to_input(crops), to_input(thumbnails), small

    def _recorded(self) -> Callable[..., Any]:
        try:
            with torch.cuda.device(self._device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return torch.cuda.make_graphed_callables(copy.copy(self._network), self._inputs())
        except RuntimeError as error:
            warnings.warn(f"classifier: CUDA graphs are not used, which is slower: {error}", stacklevel=5)
            return self._network

    def _is_each_by_itself(self) -> bool:
        """Whether an image's logits are the same to the last digit in another place, and without the others."""
        rng = np.random.default_rng(0)
        crops, thumbnails = (rng.integers(0, 256, each.shape, dtype=np.uint8) for each in self._here[:2])
        smalls = np.arange(len(crops)) % 2 == 0
        views = [Views(*each) for each in zip(crops, thumbnails, smalls, strict=True)]
        alone, found, turned = self(views[-1:]), self(views), self(views[::-1])[::-1]  # alone: beside black ones
        return np.array_equal(found, turned) and np.array_equal(found[-1:], alone)

    def __call__(self, views: Sequence[Views]) -> list[NDArray[np.float64]]:
        """Float64 logits of each."""
        most = len(self._here[0])
        groups = (views[first : first + most] for first in range(0, len(views), most))
        return [logits for group in groups for logits in self._together(group)]

    @torch.inference_mode()
    def _together(self, views: Sequence[Views]) -> NDArray[np.float64]:
        for place, each in enumerate(views):
            for here, value in zip(self._here, (each.crops, each.thumbnail, each.small), strict=True):
                here.numpy()[place] = value
        for there, here in zip(self._there, self._here, strict=True):
            there.copy_(here, non_blocking=True)
        logits: Tensor = self._run(*self._inputs())[: len(views)].double()
        if logits.device.type == "cuda":
            # Asleep: a copy would keep a core busy while it waits for the GPU, which other workers use too.
            computed = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            computed.record(torch.cuda.current_stream(logits.device))
            computed.synchronize()
        return cast(NDArray[np.float64], logits.cpu().numpy())
