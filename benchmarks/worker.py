"""What the worker around the network costs: `python -m benchmarks.worker --help`.

A runner's worker takes a folder of photographs with noise of sigma 25 from file to file: decode, classify, restore,
measure, encode, write, manifest. In turn with it, classifier and network alone run over the same pixels in memory. The
ratio of a run's speed to the mean of its neighbours' is the share of the machine that does the work proper; start-up
counts for neither: a run lasts from the first image's start to the last one's end, as its manifest tells. On a GPU a
run counts from a third of its images to five sixths, since shapes are compiled and recorded as they come (give it many
`--copies`), and is held against the network alone, with all pixels on the device, in batches.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.engine import network_and_bank, padded_tensor
from benchmarks.record import RESULTS, spread, write_csv
from classifier import load_classifier
from classifier.base import Classifier
from jobs.config import RestoreOptions
from jobs.datasets import with_noise
from jobs.networks import resolve_device, resolve_dtype
from jobs.places import sole_driver
from jobs.restore import make_runner, prepare, run
from models import Restorer, load_restorer
from models.graphs import RUNS_BEFORE
from models.memory import keep_freed_memory
from models.weights import save_checkpoint
from pipeline import plan
from pipeline.batching import batches
from pipeline.run_config import RunContext
from pipeline.sink import read_manifest
from pipeline.worker import WINDOW_IMAGES

PROMPT = "noise25"


def make_noisy(folders: list[Path], most: int, out: Path, *, suffix: str, copies: int) -> list[Path]:
    """Writes up to `most` photographs of each folder, with the field's noise of sigma 25, each so many times.

    Returns one file of each.
    """
    made = []
    for folder in folders:
        for number, path in enumerate(sorted(folder.glob("*.png"))[:most]):
            clean = np.asarray(Image.open(path).convert("RGB"))
            first = out / f"{path.stem}{suffix}"
            Image.fromarray(with_noise(clean, 25, seed=number)).save(first, quality=95, subsampling=0)
            for copy in range(1, copies):
                shutil.copy(first, out / f"{path.stem}-{copy}{suffix}")
            made.append(first)
    return made


def options(arguments: argparse.Namespace, model: str) -> RestoreOptions:
    """Those of the runs; everything else as it is by default."""
    return RestoreOptions(
        engine=arguments.engine, model=model, dtype=arguments.dtype, max_workers=arguments.workers or None,
        second_look=arguments.second_look,
    )  # fmt: skip


def model_file(name: str, folder: Path) -> str:
    """A shipped model's name or a weights file; `full` becomes a file of the published size with random weights."""
    if name != "full":
        return name
    network, bank = network_and_bank(name)
    path = folder / "full.safetensors"
    save_checkpoint(path, network, bank, licence="CC0-1.0", provenance={"weights": "random"})
    return str(path)


def seconds_alone(images: list[NDArray[np.uint8]], classifier: Classifier, restorer: Restorer) -> tuple[float, float]:
    """Classifier over all images, then the network, one image after the other unless they lie on a GPU."""
    begun = time.perf_counter()
    classifier.predict(images)
    classified = time.perf_counter()
    if restorer.device.type == "cuda":
        return classified - begun, seconds_resident(images, restorer)
    for image in images:
        restorer.restore([image], [PROMPT])
    return classified - begun, time.perf_counter() - classified


@torch.inference_mode()
def seconds_resident(images: list[NDArray[np.uint8]], restorer: Restorer) -> float:
    """The network over images that lie on the GPU, each as often as fills batches of its shape."""
    times = WINDOW_IMAGES["cuda"]
    groups = batches(images * times, key=lambda image: image.shape, limit=lambda shape: times)
    ready = []
    for group in groups:
        ready.append(torch.cat([padded_tensor(each, restorer.size_multiple) for each in group]).to(restorer.device))
    prompt = restorer.prompts.indices([PROMPT])
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for batch in ready:
        restorer._run(batch, prompt * len(batch))
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / times


def speed_of_run(source: Path, out: Path, chosen: RestoreOptions) -> tuple[float, RunContext, Counter[str]]:
    """Megapixels per second of one worker, from file to file; and what became of the images."""
    with sole_driver(source, out):
        job = prepare(source, out, chosen)
        run(job, make_runner(chosen), on_outcomes=lambda outcomes: None)
    rows = sorted(read_manifest(out).to_pylist(), key=lambda row: row["finished_at"])
    begun, counted = min(row["started_at"] for row in rows), rows
    if job.context.device == "cuda":
        first, last = len(rows) // 3, len(rows) * 5 // 6
        begun, counted = rows[first]["finished_at"], rows[first + 1 : last + 1]
    megapixels = sum(row["width"] * row["height"] for row in counted) / 1e6
    statuses = Counter(f"{row['status']} {row['prompt']}" for row in rows)
    return megapixels / (counted[-1]["finished_at"] - begun).total_seconds(), job.context, statuses


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of clean PNG photographs")
    parser.add_argument("--most", type=int, default=1000, help="photographs taken from each folder")
    parser.add_argument("--copies", type=int, default=1, help="of each photograph")
    parser.add_argument("--suffix", default=".png", help="of the files that are made: .png or .jpg")
    parser.add_argument("--model", default="dfpir-compact", help="full: the published size, random weights")
    parser.add_argument("--engine", default="local", help="local or ray")
    parser.add_argument("--workers", type=int, default=1, help="0: as many as by default")
    parser.add_argument(
        "--shard-images", type=int, default=plan.MAX_SHARD_IMAGES, help="at most; large jobs have up to 256"
    )
    parser.add_argument("--no-second-look", dest="second_look", action="store_false")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=RESULTS / "worker.csv", help="a row is added")
    arguments = parser.parse_args()
    plan.MAX_SHARD_IMAGES = arguments.shard_images
    keep_freed_memory()
    ratios, alone, whole, shares = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "noisy"
        source.mkdir()
        made = make_noisy(arguments.folders, arguments.most, source, suffix=arguments.suffix, copies=arguments.copies)
        if not made:
            parser.error("no PNG photographs in these folders")
        images = [np.asarray(Image.open(path)) for path in made]
        megapixels = sum(image.shape[0] * image.shape[1] for image in images) / 1e6
        model = model_file(arguments.model, Path(folder))
        chosen = options(arguments, model)
        device = resolve_device(chosen.device)
        dtype = getattr(torch, resolve_dtype(chosen.dtype, device))
        classifier = load_classifier(chosen.classifier, device=device, dtype=dtype)
        restorer = load_restorer(model, device=device, dtype=dtype)

        def measure_alone() -> None:
            classifying, restoring = seconds_alone(images, classifier, restorer)
            alone.append(restoring if device == "cuda" else classifying + restoring)
            shares.append(classifying / restoring)

        for _ in range(RUNS_BEFORE + 1 if device == "cuda" else 0):  # until every shape is recorded
            seconds_alone(images, classifier, restorer)
        measure_alone()
        for number in range(arguments.rounds):
            out = Path(folder) / f"run{number}"
            speed, context, statuses = speed_of_run(source, out, chosen)
            measure_alone()
            whole.append(speed)
            ratios.append((alone[-2] + alone[-1]) / 2 / (megapixels / speed))
            speeds = ", ".join(f"{each:.3f}" for each in (megapixels / alone[-2], speed, megapixels / alone[-1]))
            print(
                f"round {number + 1}: alone, worker, alone {speeds} MP/s; ratio {ratios[-1]:.1%}, classifier "
                f"{shares[-1]:.1%} of the network; {dict(statuses)}",
                flush=True,
            )
    row = {
        "engine": arguments.engine, "workers": arguments.workers,
        "ray_niceness": os.environ.get("RAY_worker_niceness", ""),  # noqa: SIM112 # Ray's name
        "source": arguments.suffix, "model": arguments.model,
        "dtype": context.config.dtype, "device": context.device,
        "threads": context.threads, "images": len(images), "copies": arguments.copies,
        "shard_images": arguments.shard_images,
        "megapixels": round(megapixels, 2),
        "rounds": arguments.rounds, **spread(ratios),
        "second_look": arguments.second_look, "classifier_to_network": round(statistics.median(shares), 4),
        "worker_megapixels_per_s": round(statistics.median(whole), 4),
        "alone_megapixels_per_s": round(megapixels / statistics.median(alone), 4),
    }  # fmt: skip
    print(f"median ratio {row['ratio']:.1%} ({row['ratio_low']:.1%} to {row['ratio_high']:.1%})")
    write_csv(arguments.csv, [row], device=context.device, add=True)


if __name__ == "__main__":
    main()
