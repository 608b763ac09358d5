"""Trains a restorer on several workers of a Ray cluster, with the loop of `jobs.train_restorer`."""

import os
import signal
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from jobs.errors import InterruptedBySignalError, TrainingError, UsageError
from jobs.ray_cluster import all_nodes, connected, measure_room
from jobs.train_restorer import train
from jobs.training_config import RestorerTraining
from jobs.training_prompts import checked_bank
from jobs.training_state import found_state


def _work(options: dict[str, Any]) -> None:
    # Ray gives every worker a folder of its own, but a configuration's paths start where the command was given.
    os.chdir(options.pop("started_in"))
    train(device=str(ray.train.torch.get_device()), **options)


def train_on_ray(
    config: RestorerTraining,
    out: Path,
    *,
    workers: int,
    device: str,
    threads: int = 1,
    loaders: int = 0,
    compiled: bool = False,
    max_minutes: float,
    address: str | None = None,
) -> None:
    """Begins a training or goes on with it; each worker has a CUDA device, or `threads` threads of a CPU.

    Every batch is shared out among the workers, some with a sample more than others, and a gradient counts for as many
    samples as it is of, so that their number changes the result by rounding alone. `out` and the working directory
    lie where all of them reach them; the first worker writes `out`.

    Args:
        config: what is trained.
        out: the training's folder.
        workers: at least 1, at most as many as the smallest batch has samples.
        device: `cpu`, `cuda`, or `auto`: GPUs if the cluster has some.
        threads: of torch, and CPUs, for each worker.
        loaders: processes of each worker that make samples ahead, and CPUs for them.
        compiled: the network of each worker, see `jobs.train_restorer.train`.
        max_minutes: of this call.
        address: of a running cluster; None: one is started here.

    Raises:
        UsageError: there are too many workers for a batch or for the cluster, or what `jobs.train_restorer.train`
            refuses.
        TrainingError: a worker failed; the message holds its fault.
        InterruptedBySignalError: SIGINT or SIGTERM ended it; what came after the last checkpoint is lost.
    """
    batch = min(phase.batch for phase in config.phases)
    if workers > batch:
        raise UsageError(f"a batch of {batch} cannot be shared among {workers} workers; use at most {batch}")
    # What needs no worker is found out before there are any.
    state = found_state(out, config)
    if state is None:
        checked_bank(config)
    elif config.progress(state["step"], state["seconds"]) >= 1:
        train(config, out)  # which says that it is over
        return
    del state  # workers load it themselves; here it would be held until they end
    options = {
        "started_in": str(Path.cwd()),
        "config": config,
        "out": out.resolve(),
        "threads": threads,
        "loaders": loaders,
        "compiled": compiled,
        "max_minutes": max_minutes,
    }
    cpus = threads + loaders
    with connected(address, threads=workers * cpus):
        nodes = all_nodes()
        if device == "auto":
            device = "cuda" if any(node["Resources"].get("GPU") for node in nodes if node["Alive"]) else "cpu"
        needs, room = measure_room(nodes, device=device, threads=cpus)
        if room < workers:
            raise UsageError(f"the Ray cluster has room for {room} workers with {needs} each, not for {workers}")
        trainer = ray.train.torch.TorchTrainer(
            _work,
            train_loop_config=options,
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers, use_gpu=device == "cuda", resources_per_worker={"CPU": needs.cpus}
            ),
            run_config=ray.train.RunConfig(name="ray", storage_path=str(out.resolve())),
        )
        try:
            trainer.fit()
        except SystemExit as end:
            # Ray Train's own handler of SIGINT ends the process as if all were well, Ray's of SIGTERM does not.
            raise InterruptedBySignalError(signal.SIGTERM if end.code else signal.SIGINT) from end
        except Exception as error:  # Ray Train wraps a worker's fault in classes of its own
            for fault in getattr(error, "worker_failures", {}).values():
                if isinstance(fault, UsageError | TrainingError):
                    raise fault from error
            raise TrainingError(f"training on Ray failed: {error}") from error
