"""Which gradients are recorded and replayed; the recording itself needs a GPU."""

import warnings
import weakref
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


def test_inputs_of_one_shape_are_recorded_when_they_have_come_twice_and_others_end_the_recording() -> None:
    counted = Counted()
    recorded = RecordedGradients(counted, [counted.parameter], record=counted.record)
    for size, calls, replays in [(1, 3, 6), (2, 6, 12), (1, 9, 18)]:
        for number in range(8):
            expect(recorded, counted, torch.rand(size) + number)
            counted.parameter.grad = None  # as others may have it
        assert (counted.calls, counted.replays) == (calls, replays)
    assert EAGER_RUNS == 2


def leave_all_as_it_is(gradients: Gradients, inputs: Sequence[Tensor]) -> Gradients:
    """Like a graph without work in it."""
    loss = gradients(*inputs)
    return lambda *inputs: loss


@pytest.mark.parametrize(
    ("counted", "why"),
    [(Counted(factor=1.1), "gradient is off by"), (Counted(factor=0.0), "gradient is off by"),
     (Counted(factor=float("nan")), "off by nan"), (Counted(fault=RuntimeError("no capture")), "no capture"),
     (Counted(fault=torch.OutOfMemoryError("full")), "full")],
)  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_recording_that_is_wrong_or_fails_is_never_used(counted: Counted, why: str, scale: float) -> None:
    recorded = RecordedGradients(counted, [counted.parameter], record=counted.record)
    counted.replays = 0
    for _ in range(EAGER_RUNS):
        expect(recorded, counted, scale * torch.rand(2))
    with pytest.warns(UserWarning, match=why):
        expect(recorded, counted, scale * torch.rand(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            expect(recorded, counted, scale * torch.rand(2))
    assert counted.replays <= 1


def test_a_recording_without_work_in_it_is_found_out() -> None:
    counted = Counted()
    recorded = RecordedGradients(counted, [counted.parameter], record=leave_all_as_it_is)
    for _ in range(EAGER_RUNS):
        expect(recorded, counted, torch.rand(2))
    with pytest.warns(UserWarning, match="off by nan"):
        expect(recorded, counted, torch.rand(2))
    expect(recorded, counted, torch.rand(2))


def test_what_a_failed_recording_held_is_let_go_before_the_step_is_taken_without() -> None:
    counted, held = Counted(), []

    def fail(gradients: Gradients, inputs: Sequence[Tensor]) -> Gradients:
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("full")

    def gradients(given: Tensor) -> Tensor:
        assert all(reference() is None for reference in held)
        return counted(given)

    recorded = RecordedGradients(gradients, [counted.parameter], record=fail)
    for _ in range(EAGER_RUNS):
        expect(recorded, counted, torch.rand(2))
    with pytest.warns(UserWarning, match="full"):
        expect(recorded, counted, torch.rand(2))
    assert len(held) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_replays_what_it_does_without_recordings() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Conv2d(8, 3, 3)).cuda()

    def gradients(given: Tensor) -> Tensor:
        network.zero_grad(set_to_none=True)
        loss = network(given).square().mean()
        loss.backward()
        return loss.detach()

    parameters = list(network.parameters())
    recorded = RecordedGradients(gradients, parameters)
    for number in range(12):
        given = torch.rand(2, 3, 16 + number // 6, 16, device="cuda")
        expected = gradients(given), [p.grad.clone() for p in parameters if p.grad is not None]
        found = recorded(given), [p.grad for p in parameters if p.grad is not None]
        torch.testing.assert_close(found, expected)
    assert recorded._replay is not None
