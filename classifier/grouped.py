"""The network asked about several images at once: faster than about one at a time, and each answer its own."""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
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


def _as_inputs(crops: Tensor, thumbnails: Tensor, small: Tensor) -> tuple[Tensor, ...]:
    return to_input(crops), to_input(thumbnails), small


class GroupedNetwork:
    """Logits of images, some at a time. On a GPU, where a group has one place for its inputs, threads take turns."""

    def __init__(self, network: DegradationNetwork, view: ViewSettings, device: torch.device) -> None:
        """`network` is on `device`; on a GPU a group is one CUDA graph."""
        self._network, self._device = network, device
        self._view = view
        self._turn: AbstractContextManager[Any] = Lock() if device.type == "cuda" else nullcontext()
        self._prepare(TOGETHER[device.type])
        if not self._is_each_by_itself():
            warnings.warn("classifier: images go one by one, which is slower: logits differ among others", stacklevel=3)
            self._prepare(1)

    def _prepare(self, together: int) -> None:
        self._together = together
        on_gpu = self._device.type == "cuda"
        # Page-locked, so that a call waits for the GPU once, for its logits. On a CPU each call has places of its own.
        self._here = [each.pin_memory() for each in self._places()] if on_gpu else []
        self._there = [each.to(self._device) for each in self._here]
        self._run: Callable[..., Any] = self._recorded() if on_gpu else self._network

    def _places(self) -> list[Tensor]:
        """Room for the views of a group, on the CPU."""
        together, view = self._together, self._view
        return [
            torch.zeros(together, view.crops, view.crop_px, view.crop_px, 3, dtype=torch.uint8, device="cpu"),
            torch.zeros(together, view.thumbnail_px, view.thumbnail_px, 3, dtype=torch.uint8, device="cpu"),
            torch.zeros(together, dtype=torch.bool, device="cpu"),
        ]

    def _recorded(self) -> Callable[..., Any]:
        try:
            with torch.cuda.device(self._device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return torch.cuda.make_graphed_callables(copy.copy(self._network), _as_inputs(*self._there))
        except RuntimeError as error:
            warnings.warn(f"classifier: CUDA graphs are not used, which is slower: {error}", stacklevel=5)
            return self._network

    def _is_each_by_itself(self) -> bool:
        """Whether an image's logits are the same to the last digit in another place, and without the others."""
        rng = np.random.default_rng(0)
        crops, thumbnails = (rng.integers(0, 256, each.shape, dtype=np.uint8) for each in self._places()[:2])
        smalls = np.arange(len(crops)) % 2 == 0
        views = [Views(*each) for each in zip(crops, thumbnails, smalls, strict=True)]
        alone, found, turned = self(views[-1:]), self(views), self(views[::-1])[::-1]  # alone: beside black ones
        return np.array_equal(found, turned) and np.array_equal(found[-1:], alone)

    def __call__(self, views: Sequence[Views]) -> list[NDArray[np.float64]]:
        """Float64 logits of each."""
        groups = (views[first : first + self._together] for first in range(0, len(views), self._together))
        return [logits for group in groups for logits in self._logits(group)]

    @torch.inference_mode()
    def _logits(self, views: Sequence[Views]) -> NDArray[np.float64]:
        with self._turn, torch.autocast(self._device.type, enabled=False):
            logits: Tensor = self._run(*_as_inputs(*self._placed(views)))[: len(views)].double()
            if logits.device.type == "cuda":
                # Asleep: a copy would keep a core busy while it waits for the GPU, which other workers use too.
                computed = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                computed.record(torch.cuda.current_stream(logits.device))
                computed.synchronize()
            return cast(NDArray[np.float64], logits.cpu().numpy())

    def _placed(self, views: Sequence[Views]) -> list[Tensor]:
        """The views of a group, on the device."""
        here = self._here or self._places()
        for place, each in enumerate(views):
            for room, value in zip(here, (each.crops, each.thumbnail, each.small), strict=True):
                room.numpy()[place] = value
        for there, room in zip(self._there, here, strict=False):  # none on a CPU
            there.copy_(room, non_blocking=True)
        return self._there or here
