"""What it gains that OpenMP's waiting threads sleep sooner: `python -m benchmarks.waiting --help`.

Restores one photograph again and again, alone and beside busy programs, with GNU OpenMP's own count of looks before
a waiting thread sleeps and with others, in turn. Each has a process of its own, which is what reads the count. A
ratio compares the medians of one round. Needs a torch with GNU OpenMP.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.record import add_csv_option, spread, write_csv

OWN_COUNT = 300_000
"""GNU OpenMP's, with no more threads than processors."""


def median_seconds(model: str, for_s: float) -> float:
    """Of restoring 512 x 512 pixels, over so many seconds."""
    from skimage import data

    from models import load_restorer

    restorer, taken = load_restorer(model), list[float]()
    image = data.astronaut()  # type: ignore[no-untyped-call]  # scikit-image leaves it untyped
    restorer.restore([image], ["noise25"])
    end = time.perf_counter() + for_s
    while time.perf_counter() < end:
        begun = time.perf_counter()
        restorer.restore([image], ["noise25"])
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """While open, so many programs keep a processor busy each."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def main() -> None:
    """Prints and writes a row for each count and number of neighbours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dfpir-compact")
    parser.add_argument("--counts", nargs="+", type=int, default=[1_000, 10_000, 30_000])
    parser.add_argument("--neighbours", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each count in a round")
    add_csv_option(parser, "waiting.csv")
    arguments = parser.parse_args()
    counts = [OWN_COUNT, *arguments.counts]
    rows = []
    print("neighbours  looks  seconds  ratio (range)")
    for beside in arguments.neighbours:
        taken: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(arguments.rounds):
            for count in counts:
                os.environ["GOMP_SPINCOUNT"] = str(count)
                with multiprocessing.get_context("spawn").Pool(1) as process, neighbours(beside):
                    taken[count].append(process.apply(median_seconds, (arguments.model, arguments.seconds)))
        for count in counts:
            ratios = [own / other for own, other in zip(taken[OWN_COUNT], taken[count], strict=True)]
            row = {
                "model": arguments.model,
                "neighbours": beside,
                "looks": count,
                "rounds": arguments.rounds,
                "seconds": round(statistics.median(taken[count]), 3),
                **spread(ratios),
            }
            rows.append(row)
            told = f"{row['ratio']:5.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
            print(f"{beside:10} {count:6} {row['seconds']:8.3f}  {told}", flush=True)
    write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
