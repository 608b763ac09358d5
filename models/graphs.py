"""CUDA graphs: the kernels of a network recorded once for a shape of input, then replayed without Python in between.

A network of many small kernels waits for Python to launch them; how much that is, `benchmarks/engine.py` measures.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from models.memory import is_out_of_memory

Forward = Callable[[Tensor, Tensor], Tensor]

RUNS_BEFORE = 2
"""Of a shape before it is recorded: recording takes as long as three runs, and a replay a tenth of one."""

MOST_SHAPES, MOST_PIXELS = 64, 32_000_000
"""Of all recordings together, which keep their inputs and outputs; what comes later is not recorded."""

LARGEST_PART = 8
"""Images that are recorded together; a power of two."""

LARGEST_PIXELS = 2_000_000
"""More than that is not recorded: its kernels are long, and a recording keeps all the memory that it needs."""


class Recording:
    """A function of tensors as a graph, with the tensors that it reads from and writes to; called like the function."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], *, beside: "Recording | None" = None
    ) -> None:
        """Records a function that has run on these shapes before.

        It shares its working memory with the recording `beside` it: one is replayed at a time, and each keeps its
        output.
        """
        self._inputs = [each.clone() for each in inputs]
        self._graph = torch.cuda.CUDAGraph()
        pool = beside._graph.pool() if beside is not None else None
        # Other threads may use the GPU meanwhile: their work is not recorded.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = function(*self._inputs)
        self._output.fill_(torch.nan)  # so that only what is replayed can pass for a result

    def __call__(self, *inputs: Tensor) -> Tensor:
        """A replay on these inputs."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._output.clone()


def record(forward: Forward, image: Tensor, prompts: Tensor, beside: Forward | None) -> Forward:
    """A replay of `forward` beside another one."""
    return Recording(forward, (image, prompts), beside=beside if isinstance(beside, Recording) else None)


def parts(count: int, *, most: int) -> list[int]:
    """What a batch of so many images is cut into, so that few sizes are recorded: powers of two, none above `most`.

    Batches of a shape come in every size. Empty if not even one image may be recorded.

    >>> parts(13, most=9)
    [8, 4, 1]
    """
    if most < 1:
        return []
    largest = min(LARGEST_PART, 1 << (most.bit_length() - 1))
    sizes = [largest] * (count // largest)
    return sizes + [bit for bit in (4, 2, 1) if count % largest & bit]


class Recorded:
    """Called like the network; threads take turns, since a recording has one place for its input.

    Batches are cut in `parts`, and those of a shape that comes often are recorded; a batch of which no part is or may
    be recorded runs as it is.

    A new recording is held against the network's own result, which is returned. Should it differ, or recording fail, a
    warning says so and the network runs without recordings from then on.
    """

    def __init__(
        self, forward: Forward, *, record: Callable[[Forward, Tensor, Tensor, Forward | None], Forward] = record
    ) -> None:
        self._forward, self._record = forward, record
        self._recordings: dict[torch.Size, Forward] = {}
        self._seen: Counter[torch.Size] = Counter()
        self._room = MOST_PIXELS
        self._works = True
        self._turn = Lock()

    def __call__(self, image: Tensor, prompts: Tensor) -> Tensor:
        """The network's output; raises what it raises."""
        with self._turn:
            return self._found(image, prompts)

    def _found(self, image: Tensor, prompts: Tensor) -> Tensor:
        pixels = image.shape[2] * image.shape[3]
        sizes = parts(len(image), most=LARGEST_PIXELS // pixels)
        if not any((size, *image.shape[1:]) in self._recordings or self._has_room(size * pixels) for size in sizes):
            return self._output(image, prompts)
        pairs = zip(torch.split(image, sizes), torch.split(prompts, sizes), strict=True)
        found = [self._part(*pair) for pair in pairs]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _part(self, image: Tensor, prompts: Tensor) -> Tensor:
        shape = image.shape
        if recording := self._recordings.get(shape):
            return recording(image, prompts)
        output = self._output(image, prompts)
        pixels = shape[0] * shape[2] * shape[3]
        if not self._has_room(pixels):
            return output
        self._seen[shape] += 1
        if self._seen[shape] > RUNS_BEFORE:
            self._try_recording(image, prompts, output)
            self._room -= pixels
        return output

    def _has_room(self, pixels: int) -> bool:
        return self._works and pixels <= self._room and len(self._recordings) < MOST_SHAPES

    def _output(self, image: Tensor, prompts: Tensor) -> Tensor:
        """The network's; if memory is full, once more without what recordings keep."""
        try:
            return self._forward(image, prompts)
        except RuntimeError as error:
            if not (self._recordings and is_out_of_memory(error)):
                raise
        self._recordings.clear()
        self._room = 0
        torch.cuda.empty_cache()
        return self._forward(image, prompts)

    def _try_recording(self, image: Tensor, prompts: Tensor, expected: Tensor) -> None:
        try:
            beside = next(iter(self._recordings.values()), None)
            recording = self._record(self._forward, image, prompts, beside)
            difference = float((recording(image, prompts) - expected).abs().max())
        except RuntimeError as error:
            if is_out_of_memory(error):
                self._room = 0  # there is some for the network, not for keeping what it needs
            else:
                self._give_up(str(error))
            return
        if difference <= 1e-3:
            self._recordings[image.shape] = recording
        else:
            self._give_up(f"a replay is off by {difference:.1e}")

    def _give_up(self, why: str) -> None:
        warnings.warn(f"models: CUDA graphs are not used, which is slower for small images: {why}", stacklevel=5)
        self._works = False
        self._recordings.clear()
