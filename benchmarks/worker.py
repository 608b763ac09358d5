"""What the worker around the network costs: `python -m benchmarks.worker --help`.

A worker takes a folder of photographs with noise of sigma 25 from file to file: decode, classify, restore, measure,
encode, write, manifest. In turn with it, classifier and network alone run over the same pixels in memory. The ratio of
the two speeds, round by round, is the share of the machine that does the work proper; start-up counts for neither.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.classifier_recall import noisy
from benchmarks.record import RESULTS, write_csv
from classifier import load_classifier
from classifier.base import Classifier
from jobs.config import RestoreOptions
from jobs.restore import prepare, sole_driver
from models import Restorer, load_restorer
from pipeline.records import Outcome
from pipeline.run_config import RunContext
from pipeline.worker import build_worker

PROMPT = "noise25"


def make_noisy(folders: list[Path], most: int, out: Path) -> None:
    """Writes up to `most` photographs of each folder as PNG, with the field's noise of sigma 25."""
    for folder in folders:
        for number, path in enumerate(sorted(folder.glob("*.png"))[:most]):
            clean = np.asarray(Image.open(path).convert("RGB"))
            Image.fromarray(noisy(clean, 25, seed=number)).save(out / path.name)


def options(arguments: argparse.Namespace) -> RestoreOptions:
    """Those of the runs; everything else as it is by default."""
    return RestoreOptions(engine="local", model=arguments.model, dtype=arguments.dtype)


def seconds_alone(source: Path, classifier: Classifier, restorer: Restorer) -> float:
    """Classifier and network over all images, which are decoded before."""
    images = [np.asarray(Image.open(path)) for path in sorted(source.glob("*.png"))]
    begun = time.perf_counter()
    for image in images:
        classifier.predict([image])
        restorer.restore([image], [PROMPT])
    return time.perf_counter() - begun


def seconds_of_worker(source: Path, out: Path, chosen: RestoreOptions) -> tuple[float, RunContext, Counter[str]]:
    """A worker over all images, from file to file; and what became of them."""
    with sole_driver(source, out):
        job = prepare(source, out, chosen)
        worker = build_worker(job.context, "benchmark")
        statuses: Counter[str] = Counter()

        def count(outcomes: list[Outcome]) -> None:
            statuses.update(f"{outcome.status} {outcome.prompt}" for outcome in outcomes)

        begun = time.perf_counter()
        for shard in job.left:
            worker(shard, attempt=1, on_outcomes=count)
        return time.perf_counter() - begun, job.context, statuses


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of clean PNG photographs")
    parser.add_argument("--most", type=int, default=1000, help="photographs taken from each folder")
    parser.add_argument("--model", default="dfpir-compact")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=RESULTS / "worker.csv")
    arguments = parser.parse_args()
    ratios, alone, whole = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "noisy"
        source.mkdir()
        make_noisy(arguments.folders, arguments.most, source)
        sizes = [Image.open(path).size for path in source.iterdir()]
        megapixels = sum(width * height for width, height in sizes) / 1e6
        for number in range(arguments.rounds):
            out = Path(folder) / f"run{number}"
            seconds, context, statuses = seconds_of_worker(source, out, options(arguments))
            classifier = load_classifier(context.config.classifier, device=context.device)
            restorer = load_restorer(arguments.model, device=context.device, dtype=getattr(torch, context.config.dtype))
            whole.append(seconds)
            alone.append(seconds_alone(source, classifier, restorer))
            ratios.append(alone[-1] / seconds)
            print(
                f"round {number + 1}: worker {megapixels / seconds:.3f} MP/s, alone {megapixels / alone[-1]:.3f} MP/s,"
            )
            print(f"  ratio {ratios[-1]:.1%}; {dict(statuses)}", flush=True)
    row = {
        "model": arguments.model, "dtype": context.config.dtype, "device": context.device,
        "threads": context.threads, "images": len(sizes), "megapixels": round(megapixels, 2),
        "rounds": arguments.rounds, "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3), "ratio_high": round(max(ratios), 3),
        "worker_megapixels_per_s": round(megapixels / statistics.median(whole), 4),
        "alone_megapixels_per_s": round(megapixels / statistics.median(alone), 4),
    }  # fmt: skip
    print(f"median ratio {row['ratio']:.1%} ({row['ratio_low']:.1%} to {row['ratio_high']:.1%})")
    write_csv(arguments.csv, [row])


if __name__ == "__main__":
    main()
