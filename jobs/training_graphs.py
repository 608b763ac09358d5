"""A step's gradients as a CUDA graph: thousands of small kernels that a GPU runs without waiting for Python.

Launching the compact network's forward and backward kernels one by one takes an H100 longer than running them does
(docs/decisions/0017).
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradients = Callable[..., Tensor]
"""Of input tensors: leaves gradients in the parameters, each with new memory, and returns the loss."""

EAGER_RUNS = 2
"""Of a shape before it is recorded, so that libraries have chosen their kernels."""

TOLERANCE = 0.02
"""Of loss and of the gradient's norm: bfloat16 sums come in another order with every run."""


def record(gradients: Gradients, inputs: Sequence[Tensor]) -> Gradients:
    """A replay of `gradients` on inputs of these shapes."""
    mine = [each.clone() for each in inputs]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(*mine)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A loader's thread may take page-locked memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = gradients(*mine)

    def replay(*inputs: Tensor) -> Tensor:
        for there, given in zip(mine, inputs, strict=True):
            there.copy_(given)
        graph.replay()
        return loss

    return replay


class RecordedGradients:
    """Called like the function of gradients that it is made of; a shape of inputs is recorded when it has come twice.

    A recording is held against the function's own loss and gradient. Should they differ, or recording fail, a warning
    says so and the function runs without recordings from then on.
    """

    def __init__(
        self,
        gradients: Gradients,
        parameters: Sequence[Tensor],
        *,
        record: Callable[[Gradients, Sequence[Tensor]], Gradients] = record,
    ) -> None:
        self._gradients, self._parameters, self._record = gradients, parameters, record
        self._seen: Counter[tuple[torch.Size, ...]] = Counter()
        self._recordings: dict[tuple[torch.Size, ...], tuple[Gradients, list[Tensor | None]]] = {}
        self._works = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss, a tensor that the next call may write to; raises what the function raises."""
        shapes = tuple(each.shape for each in inputs)
        if shapes in self._recordings:
            replay, gradients = self._recordings[shapes]
            loss = replay(*inputs)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return loss
        self._seen[shapes] += 1
        if not self._works or self._seen[shapes] <= EAGER_RUNS:
            return self._gradients(*inputs)
        expected = self._gradients(*inputs), self._norm()
        try:
            replay = self._record(self._gradients, inputs)
            found = replay(*inputs), self._norm()
            for own, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(own, theirs, rtol=TOLERANCE, atol=TOLERANCE)
        except (RuntimeError, AssertionError) as error:
            self._works = False
            self._recordings.clear()
            warnings.warn(f"training: CUDA graphs are not used, which is slower: {error}", stacklevel=2)
            return self._gradients(*inputs)
        self._recordings[shapes] = replay, [parameter.grad for parameter in self._parameters]
        return found[0]

    def _norm(self) -> Tensor:
        """Of all gradients; not finite where the loss is not."""
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
