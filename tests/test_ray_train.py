"""Training on Ray: the loop is that of `jobs.train_restorer`, whose tests hold here too."""

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_weights import write_tiny_model
from test_train_restorer import averages, photographs, quick_validation, tiny

from classifier.labels import Degradation
from jobs.errors import InterruptedBySignalError, TrainingError, UsageError
from jobs.ray_train import train_on_ray
from jobs.train_restorer import Training, train
from jobs.training_config import ConfigError, Data, Phase
from jobs.training_group import Group
from jobs.training_state import found_state

__all__ = ["photographs", "quick_validation"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_validation")
def test_two_workers_learn_what_one_process_does(
    ray_cluster: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though one of them has two of three samples."""
    # One task, since validation takes its time for each; it has three prompts.
    phase = Phase(start=0.0, patch_px=32, batch=3, tasks={Degradation.NOISE: 1.0})
    config = tiny(photographs, steps=2, phases=(phase,))
    (photographs / "broken.png").write_bytes(b"no image")
    train(config, tmp_path / "alone", threads=1)
    monkeypatch.chdir(photographs.parent)
    relative = replace(config, data=Data(clean=(Path(photographs.name),)))
    train_on_ray(relative, tmp_path / "ray", workers=2, device="auto", max_minutes=60.0)
    first, second = averages(tmp_path / "alone"), averages(tmp_path / "ray")
    assert first.keys() == second.keys()
    # A sum in another order may turn the sign of a gradient that is almost nothing, and with it a step of Adam.
    close = [torch.isclose(first[key].float(), second[key].float(), atol=1e-4).float().mean() for key in first]
    assert float(torch.stack(close).mean()) > 0.99
    state = torch.load(tmp_path / "ray" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert "broken.png" in (tmp_path / "ray" / "training.log").read_text()


def test_gradients_count_for_as_many_samples_as_they_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.zeros(2, 2), torch.zeros(3)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    group = Group(torch.device("cpu"))
    group.size = 2

    def with_the_other(flat: torch.Tensor) -> None:
        """A second process has one sample, of gradient 4."""
        flat += torch.tensor([4.0] * 7 + [1.0])

    monkeypatch.setattr("torch.distributed.all_reduce", with_the_other)
    group.average_gradients(parameters, samples=2)
    assert all(torch.equal(each.grad, torch.full_like(each, 2.0)) for each in parameters if each.grad is not None)


def test_what_needs_no_worker_is_refused_before_there_are_any(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ray_train.connected", None)
    with pytest.raises(UsageError, match="a batch of 2 cannot be shared among 3 workers; use at most 2"):
        train_on_ray(tiny(photographs), tmp_path, workers=3, device="cpu", max_minutes=60.0)
    with pytest.raises(UsageError, match=r"prompts: .*neither a weights file nor a shipped model"):
        train_on_ray(tiny(photographs, prompts="nowhere"), tmp_path, workers=2, device="cpu", max_minutes=60.0)
    Training(tiny(photographs), tmp_path / "out", torch.device("cpu")).save()
    with pytest.raises(ConfigError, match="seed: was 0, is now 1"):
        train_on_ray(tiny(photographs, seed=1), tmp_path / "out", workers=2, device="cpu", max_minutes=60.0)


def test_prompts_of_a_checkpoint_count_whatever_becomes_of_their_file(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tiny_model(tmp_path / "prompts.safetensors")
    config = tiny(photographs, prompts=str(file))
    Training(config, tmp_path / "out", torch.device("cpu")).save()
    file.unlink()

    def reached(*_: object, **__: object) -> None:
        raise RuntimeError("Ray")

    monkeypatch.setattr("jobs.ray_train.connected", reached)
    with pytest.raises(RuntimeError, match="Ray"):
        train_on_ray(config, tmp_path / "out", workers=2, device="cpu", max_minutes=60.0)


def test_a_checkpoint_is_not_held_while_workers_train(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its optimiser it is four times the network."""
    config = tiny(photographs)
    Training(config, tmp_path, torch.device("cpu")).save()

    class State(dict[str, Any]):
        pass

    held: list[weakref.ref[State]] = []

    def found(*given: Any) -> State:
        state = State(found_state(*given) or {})
        held.append(weakref.ref(state))
        return state

    def reached(*_: object, **__: object) -> None:
        raise RuntimeError("held" if held[0]() is not None else "let go")

    monkeypatch.setattr("jobs.ray_train.found_state", found)
    monkeypatch.setattr("jobs.ray_train.connected", reached)
    with pytest.raises(RuntimeError, match="let go"):
        train_on_ray(config, tmp_path, workers=2, device="cpu", max_minutes=60.0)


@pytest.mark.usefixtures("quick_validation")
def test_a_training_that_is_over_starts_no_ray(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(photographs, steps=1)
    train(config, tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    monkeypatch.setattr("jobs.ray_train.connected", None)
    with caplog.at_level("INFO"):
        train_on_ray(config, tmp_path, workers=2, device="cpu", max_minutes=60.0)
    assert "the training is over, at step 1" in caplog.text
    assert (tmp_path / "checkpoint.pt").exists()  # of the portable one


@pytest.mark.slow
def test_what_a_worker_refuses_is_told_as_one_process_would(
    ray_cluster: str, photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"^.*nowhere is not a folder; paths start at the working directory"):
        train_on_ray(tiny(photographs / "nowhere"), tmp_path, workers=2, device="cpu", max_minutes=60.0)


def test_another_fault_of_a_worker_ends_the_training_with_its_message(
    ray_cluster: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object) -> None:
        raise RuntimeError("a worker's process is gone")

    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", broken)
    with pytest.raises(TrainingError, match="training on Ray failed: a worker's process is gone"):
        train_on_ray(tiny(photographs), tmp_path, workers=1, device="cpu", max_minutes=60.0)


@pytest.mark.parametrize(("code", "name"), [(0, "SIGINT"), (1, "SIGTERM")])  # what Ray's handlers end a process with
def test_a_signal_is_told_as_an_interruption(
    code: int, name: str, ray_cluster: str, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", lambda self: sys.exit(code))
    with pytest.raises(InterruptedBySignalError, match=f"ended by {name}; the same command goes on"):
        train_on_ray(tiny(photographs), tmp_path, workers=1, device="cpu", max_minutes=60.0)


@pytest.mark.slow
def test_more_workers_than_there_is_room_for_are_refused(ray_cluster: str, photographs: Path, tmp_path: Path) -> None:
    phase = Phase(start=0.0, patch_px=32, batch=3, tasks=dict(tiny(photographs).phases[0].tasks))
    with pytest.raises(UsageError, match="room for 2 workers with 1 CPU each, not for 3"):
        train_on_ray(tiny(photographs, phases=(phase,)), tmp_path, workers=3, device="cpu", max_minutes=60.0)
