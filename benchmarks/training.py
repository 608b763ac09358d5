"""What a step of a restorer's training takes, and how busy it is kept: `python -m benchmarks.training --help`.

For each patch size of a configuration: steps on one batch that lies on the device, plain and compiled in turn, and
with `--photographs` steps that are fed by loader processes and the device's own degradations, as in a training. The
ratio of the two is the share of the time that the device is at steps, if it does nothing else meanwhile.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import add_csv_option, write_csv
from jobs.restorer_samples import Ahead, Batch, Sample, Sources
from jobs.train_restorer import Training, batches
from jobs.training_config import Phase, RestorerTraining, read_config
from models.memory import keep_freed_memory
from pipeline.prompting import prompts_for

CONFIG = Path(__file__).parents[1] / "configs" / "compact.toml"
VARIANTS = ("plain", "compiled")


def random_batch(phase: Phase) -> Batch:
    """Random pixels under the phase's first task: a step takes as long on any."""
    shape = phase.patch_px, phase.patch_px, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Batch.of([Sample(pixels, pixels, prompts_for(next(iter(phase.tasks)))[0], "random")] * phase.batch)


def seconds(step: Callable[[], float]) -> float:
    """Of one step; a GPU is waited for, since the loss is read."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def alone(trainings: dict[str, Training], phase: Phase, steps: int) -> dict[str, float]:
    """Median seconds of a step on a batch that lies on the device, the variants in turn."""
    times: dict[str, list[float]] = {name: [] for name in trainings}
    ready = random_batch(phase).to(next(iter(trainings.values())).device)
    for number in range(steps + 2):
        for name, training in trainings.items():
            taken = seconds(partial(training.learn, ready))
            if number >= 2:  # the first ones compile and warm up
                times[name].append(taken)
    return {name: statistics.median(each) for name, each in times.items()}


def fed(training: Training, sources: Sources, phase: Phase, *, loaders: int, steps: int) -> float:
    """Mean seconds of a step with samples as a training gets them, once the loaders are under way."""
    places = ((step, phase) for step in itertools.count())
    ahead = Ahead(iter(batches(training, sources, places, loaders=loaders)), training.device)
    # A GPU plans a Fourier transform when its size comes for the first time.
    for _ in range(100 if training.device.type == "cuda" else 0):
        ahead.take()
    for _ in range(2 * loaders + 2):  # what loaders have made before the first step is used up
        training.learn(ahead.take(), ahead.meanwhile)
    return statistics.fmean(seconds(lambda: training.learn(ahead.take(), ahead.meanwhile)) for _ in range(steps))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--batch", type=int, help="instead of the phases' own")
    parser.add_argument("--patches", type=int, nargs="*", default=[], help="only these of its patch sizes, in pixels")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--photographs", type=Path, help="clean ones, for steps that are fed")
    parser.add_argument("--loaders", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15, help="timed, of each, for every patch size")
    add_csv_option(parser, "training.csv")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    config = read_config(RestorerTraining, arguments.config)
    sources = None
    if arguments.photographs is not None:
        sources = Sources.load(replace(config.data, clean=(arguments.photographs,))).part(validation=False)
    device, rows = torch.device(arguments.device), []
    with tempfile.TemporaryDirectory() as folder:
        trainings = {
            name: Training(config, Path(folder) / name, device, compiled=name == "compiled")
            for name in arguments.variants
        }
        phases = [replace(phase, batch=arguments.batch or phase.batch) for phase in config.phases]
        for (side, size), phase in sorted({(p.patch_px, p.batch): p for p in phases}.items(), key=lambda item: item[0]):
            if arguments.patches and side not in arguments.patches:
                continue
            taken = alone(trainings, phase, arguments.steps)
            for name, training in trainings.items():
                row = {
                    "config": arguments.config.name, "device": device.type, "threads": arguments.threads,
                    "loaders": arguments.loaders, "patch_px": side, "batch": size, "steps": arguments.steps,
                    "variant": name, "step_s": round(taken[name], 4),
                    "ratio_to_plain": round(taken["plain"] / taken[name], 2) if "plain" in taken else "",
                    "share_at_steps": "",
                }  # fmt: skip
                if sources is not None:
                    busy = fed(training, sources, phase, loaders=arguments.loaders, steps=arguments.steps)
                    row["share_at_steps"] = round(taken[name] / busy, 3)
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                rows.append(row)
    write_csv(arguments.csv, rows, device=arguments.device)


if __name__ == "__main__":
    main()
