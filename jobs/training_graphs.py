"""A step's gradients as a CUDA graph: thousands of small kernels that a GPU runs without waiting for Python.

Launching the compact network's forward and backward kernels one by one takes an H100 longer than running them does
(docs/decisions/0017).
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.graphs import Recording

Gradients = Callable[..., Tensor]
"""Of input tensors: leaves gradients in the parameters, each with new memory, and returns the loss."""

EAGER_RUNS = 2
"""Of a shape before it is recorded, so that libraries have chosen their kernels."""

TOLERANCE = 0.02
"""Of the loss, and of the gradient, as the norm of the difference: sums may come in another order."""


def record(gradients: Gradients, inputs: Sequence[Tensor]) -> Gradients:
    """A replay of `gradients` on inputs of these shapes."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    return Recording(gradients, inputs)


class RecordedGradients:
    """Called like the function that it is made of; inputs of one shape are recorded when they have come twice.

    The recording is held against the function's own loss and gradients. Should they differ, or recording fail, a
    warning says so and the function runs without recordings from then on. Inputs of another shape end a recording:
    a training's patches grow, and do not come back.
    """

    def __init__(
        self,
        gradients: Gradients,
        parameters: Sequence[Tensor],
        *,
        record: Callable[[Gradients, Sequence[Tensor]], Gradients] = record,
    ) -> None:
        self._gradients, self._parameters, self._record = gradients, parameters, record
        self._shapes: list[torch.Size] = []
        self._runs = 0
        self._replay: Gradients | None = None
        self._replayed: list[Tensor | None] = []
        """The gradients that it writes to, by parameter."""
        self._works = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The loss; raises what the function raises."""
        shapes = [each.shape for each in inputs]
        if shapes != self._shapes:
            self._shapes, self._runs, self._replay = shapes, 0, None
        if self._replay is not None:
            for parameter, gradient in zip(self._parameters, self._replayed, strict=True):
                parameter.grad = gradient
            return self._replay(*inputs)
        loss = self._gradients(*inputs)
        self._runs += 1
        if not self._works or self._runs <= EAGER_RUNS:
            return loss
        fault = self._fault_of_recording(inputs, loss)
        if fault is None:
            return loss
        self._works, self._replay = False, None
        warnings.warn(f"training: CUDA graphs are not used, which is slower: {fault}", stacklevel=2)
        torch.cuda.empty_cache()  # of what was recorded
        return self._gradients(*inputs)

    def _fault_of_recording(self, inputs: Sequence[Tensor], loss: Tensor) -> str | None:
        """Records, and says what is wrong with it; its gradients stay with the parameters."""
        expected = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        try:
            self._replay = self._record(self._gradients, inputs)
            self._replayed = [parameter.grad for parameter in self._parameters]
            found = [gradient for gradient in self._replayed if gradient is not None]
            torch._foreach_mul_(found, torch.nan)
            again = self._replay(*inputs)
        except RuntimeError as error:
            return str(error)
        norm = torch.nn.utils.get_total_norm(expected)
        difference = torch.nn.utils.get_total_norm(torch._foreach_sub(found, expected))
        # What is no number is not below anything.
        if bool((again - loss).abs() <= TOLERANCE * loss.abs()) and bool(difference <= TOLERANCE * norm):
            return None
        return f"a replay's gradient is off by {float(difference):.1e} of {float(norm):.1e}"
