"""Training on Ray: the loop is that of `jobs.train_restorer`, whose tests hold here too."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train_restorer import averages, photographs, tiny

from jobs.errors import TrainingError, TrainingInterruptedError, UsageError
from jobs.ray_train import train_on_ray
from jobs.train_restorer import Training, train
from jobs.training_config import Data, Phase

__all__ = ["photographs"]


@pytest.mark.slow
def test_two_workers_learn_what_one_process_does(
    ray_cluster: None, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(photographs, steps=2)
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


def test_a_batch_that_cannot_be_shared_out_is_refused(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three(self: object, device: torch.device) -> None:
        self.rank, self.size, self.device = 0, 3, device  # type: ignore[attr-defined]

    monkeypatch.setattr("jobs.training_group.Group.__init__", three)
    with pytest.raises(UsageError, match="a batch of 2 cannot be shared among 3 workers"):
        Training(tiny(photographs), tmp_path, torch.device("cpu"))


@pytest.mark.slow
def test_a_workers_fault_ends_the_training_with_its_message(
    ray_cluster: None, photographs: Path, tmp_path: Path
) -> None:
    phase = Phase(start=0.0, patch_px=32, batch=3, tasks=dict(tiny(photographs).phases[0].tasks))
    with pytest.raises(TrainingError, match="a batch of 3 cannot be shared among 2 workers"):
        train_on_ray(tiny(photographs, phases=(phase,)), tmp_path, workers=2, device="cpu", max_minutes=60.0)


def test_ctrl_c_is_told_as_an_interruption(
    ray_cluster: None, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", lambda self: sys.exit(0))  # what Ray Train's handler does
    with pytest.raises(TrainingInterruptedError, match="ended by SIGINT; the same command goes on"):
        train_on_ray(tiny(photographs), tmp_path, workers=1, device="cpu", max_minutes=60.0)


@pytest.mark.slow
def test_more_workers_than_there_is_room_for_are_refused(ray_cluster: None, photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="room for 2 workers with 1 CPU each, not for 3"):
        train_on_ray(tiny(photographs), tmp_path, workers=3, device="cpu", max_minutes=60.0)
