"""CUDA graphs: the kernels of a network recorded once for a shape of input, then replayed without Python in between.

A network of many small kernels waits for Python to launch them; how much that is, `benchmarks/engine.py` measures.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor], Tensor]

MOST_SHAPES = 8
"""Shapes whose recordings are kept, and as many more that are remembered as seen once."""

LARGEST_PIXELS = 4_000_000
"""A larger batch is not recorded, since a recording keeps all the memory it needs."""


@dataclass
class _Recording:
    """A graph with the tensors that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    image: Tensor
    prompts: Tensor
    output: Tensor

    def __call__(self, image: Tensor, prompts: Tensor) -> Tensor:
        self.image.copy_(image)
        self.prompts.copy_(prompts)
        self.graph.replay()
        return self.output.clone()


def record(forward: Forward, image: Tensor, prompts: Tensor, beside: Forward | None) -> Forward:
    """A replay of `forward`, which has run on these shapes before.

    It shares its working memory with the recording `beside` it: one is replayed at a time, and each keeps its output.
    """
    image, prompts = image.clone(), prompts.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=beside.graph.pool() if isinstance(beside, _Recording) else None):
        output = forward(image, prompts)
    output.fill_(torch.nan)  # so that only what is replayed can pass for a result
    return _Recording(graph, image, prompts, output)


class Recorded:
    """Called like the network. A shape is recorded the second time it comes; other calls run as they are.

    A new recording is held against the network's own result, which is returned. Should it differ, or recording fail, a
    warning says so and the network runs without recordings from then on.
    """

    def __init__(
        self, forward: Forward, *, record: Callable[[Forward, Tensor, Tensor, Forward | None], Forward] = record
    ) -> None:
        self._forward, self._record = forward, record
        self._recordings: OrderedDict[torch.Size, Forward] = OrderedDict()
        self._seen: OrderedDict[torch.Size, None] = OrderedDict()
        self._works = True

    def __call__(self, image: Tensor, prompts: Tensor) -> Tensor:
        """The network's output; raises what it raises."""
        shape = image.shape
        if recording := self._recordings.get(shape):
            self._recordings.move_to_end(shape)
            return recording(image, prompts)
        output = self._forward(image, prompts)
        if self._works and shape[0] * shape[2] * shape[3] <= LARGEST_PIXELS:
            if shape in self._seen:
                del self._seen[shape]
                self._try_recording(image, prompts, output)
            else:
                _put(self._seen, shape, None)
        return output

    def _try_recording(self, image: Tensor, prompts: Tensor, expected: Tensor) -> None:
        try:
            beside = next(iter(self._recordings.values()), None)
            recording = self._record(self._forward, image, prompts, beside)
            difference = float((recording(image, prompts) - expected).abs().max())
        except torch.OutOfMemoryError:
            return  # there is room for the network, not for keeping what it needs
        except RuntimeError as error:
            self._give_up(str(error))
            return
        if difference <= 1e-3:
            _put(self._recordings, image.shape, recording)
        else:
            self._give_up(f"a replay is off by {difference:.1e}")

    def _give_up(self, why: str) -> None:
        warnings.warn(f"models: CUDA graphs are not used, which is slower for small images: {why}", stacklevel=4)
        self._works = False
        self._recordings.clear()


def _put(kept: OrderedDict[torch.Size, Any], shape: torch.Size, value: object) -> None:
    """Adds an entry, in the place of the one that was not needed for longest once there are too many."""
    kept[shape] = value
    if len(kept) > MOST_SHAPES:
        kept.popitem(last=False)
