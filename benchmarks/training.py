"""What compiling gains in a training of the restorer: `python -m benchmarks.training --help`.

Steps of a configuration's phases on samples made before, plain and compiled in turn; the ratio is of their medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import RESULTS, write_csv
from jobs.restorer_samples import Batch, ReadyBatch, Sample
from jobs.train_restorer import Training
from jobs.training_config import Phase, RestorerTraining, read_config
from models.memory import keep_freed_memory
from pipeline.prompting import prompts_for

CONFIG = Path(__file__).parents[1] / "configs" / "compact.toml"


def random_batch(phase: Phase) -> Batch:
    """Random pixels under the phase's first task: a step takes as long on any."""
    shape = phase.patch_px, phase.patch_px, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Batch.of([Sample(pixels, pixels, prompts_for(next(iter(phase.tasks)))[0], "random")] * phase.batch)


def seconds_per_step(training: Training, batch: ReadyBatch) -> float:
    """Of one step; a GPU is waited for, since the loss is read."""
    begun = time.perf_counter()
    training.learn(batch)
    return time.perf_counter() - begun


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--patches", type=int, nargs="*", default=[], help="only these of its patch sizes, in pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15, help="timed, of each, for every patch size")
    parser.add_argument("--csv", type=Path, default=RESULTS / "training.csv")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    config = read_config(RestorerTraining, arguments.config)
    device = torch.device(arguments.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        both = [Training(config, Path(folder) / str(flag), device, compiled=flag) for flag in (False, True)]
        phases = {(phase.patch_px, phase.batch): phase for phase in config.phases}
        for (side, size), phase in sorted(phases.items(), key=lambda item: item[0]):
            if arguments.patches and side not in arguments.patches:
                continue
            batch = random_batch(phase).to(device)
            first = [seconds_per_step(training, batch) for training in both for _ in range(2)]
            times = [[seconds_per_step(training, batch) for training in both] for _ in range(arguments.steps)]
            plain, compiled = (statistics.median(each) for each in zip(*times, strict=True))
            row = {
                "config": arguments.config.name, "device": device.type, "threads": arguments.threads, "patch_px": side,
                "batch": size, "steps": arguments.steps, "plain_s": round(plain, 4), "compiled_s": round(compiled, 4),
                "ratio": round(plain / compiled, 2), "first_compiled_step_s": round(first[2], 1),
            }  # fmt: skip
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
