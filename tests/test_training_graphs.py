"""Which gradients are recorded and replayed; the recording itself needs a GPU."""

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from jobs.training_graphs import EAGER_RUNS, Gradients, RecordedGradients


class Counted:
    """The gradient of (parameter x input)^2, and its recording, off by a factor; both count their calls."""

    def __init__(self, factor: float = 1.0, fault: Exception | None = None) -> None:
        self.parameter = torch.tensor([3.0], requires_grad=True)
        self.calls, self.replays, self.factor, self.fault = 0, 0, factor, fault

    def __call__(self, given: Tensor) -> Tensor:
        self.calls += 1
        self.parameter.grad = None
        loss = (self.parameter * given).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def record(self, gradients: Gradients, inputs: Sequence[Tensor]) -> Gradients:
        if self.fault:
            raise self.fault
        kept = torch.zeros(1)
        self.parameter.grad = kept

        def replay(given: Tensor) -> Tensor:
            self.replays += 1
            kept.copy_(self.factor * 2 * self.parameter.detach() * given.square().sum())
            return (self.parameter.detach() * given).square().sum()

        return replay


def expect(recorded: RecordedGradients, counted: Counted, given: Tensor) -> None:
    loss = recorded(given)
    assert loss.item() == pytest.approx(9 * given.square().sum().item())
    assert counted.parameter.grad is not None
    assert counted.parameter.grad.item() == pytest.approx(6 * given.square().sum().item())


def test_a_shape_is_recorded_when_it_has_come_twice_and_its_gradients_are_found_again_after_another_shapes() -> None:
    counted = Counted()
    recorded = RecordedGradients(counted, [counted.parameter], record=counted.record)
    for number in range(8):
        for size in (1, 2):
            expect(recorded, counted, torch.rand(size) + number)
    assert (counted.calls, counted.replays) == (2 * (EAGER_RUNS + 1), 2 * (8 - EAGER_RUNS))


@pytest.mark.parametrize(
    ("counted", "why"),
    [(Counted(factor=1.1), "not close"), (Counted(factor=float("nan")), "not close"),
     (Counted(fault=RuntimeError("no capture")), "no capture")],
)  # fmt: skip
def test_a_recording_that_is_wrong_or_fails_is_never_used(counted: Counted, why: str) -> None:
    recorded = RecordedGradients(counted, [counted.parameter], record=counted.record)
    for _ in range(EAGER_RUNS):
        expect(recorded, counted, torch.rand(2))
    with pytest.warns(UserWarning, match=why):
        expect(recorded, counted, torch.rand(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            expect(recorded, counted, torch.rand(2))
    assert counted.replays <= 1
