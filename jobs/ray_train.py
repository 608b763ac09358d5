"""Trains a restorer on several workers of a Ray cluster, with the loop of `jobs.train_restorer`."""

from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from jobs.errors import TrainingError
from jobs.ray_cluster import connected
from jobs.train_restorer import train
from jobs.training_config import RestorerTraining


def _work(options: dict[str, Any]) -> None:
    train(device=str(ray.train.torch.get_device()), **options)


def train_on_ray(
    config: RestorerTraining,
    out: Path,
    *,
    workers: int,
    device: str,
    threads: int = 1,
    loaders: int = 0,
    max_minutes: float,
    save_every_s: float = 300.0,
    address: str | None = None,
) -> None:
    """Begins a training or goes on with it; each worker has a CUDA device, or `threads` threads of a CPU.

    Every batch is shared out among the workers, so that their number changes the result by rounding alone. `out` lies
    where all of them reach it; the first one writes it.

    Raises:
        TrainingError: a worker failed; the message holds its fault.
    """
    options = {
        "config": config,
        "out": out.resolve(),
        "threads": threads,
        "loaders": loaders,
        "max_minutes": max_minutes,
        "save_every_s": save_every_s,
    }
    with connected(address, threads=workers * (threads + loaders)):
        trainer = ray.train.torch.TorchTrainer(
            _work,
            train_loop_config=options,
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu=device == "cuda", resources_per_worker={"CPU": threads + loaders}
            ),
            run_config=ray.train.RunConfig(name="ray", storage_path=str(out.resolve())),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray Train wraps a worker's fault in classes of its own
            raise TrainingError(f"training on Ray failed: {error}") from error
