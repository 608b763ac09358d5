"""Time and memory to plan a large source: `python -m benchmarks.planning --help`.

Makes that many real files in folders of a thousand, and a list that names them, and plans each in a process of its own:
list, plan, read the plan back, and find what is left to do; then the same again, when nothing has changed. Memory is
the process's peak, and what of it came on top of the imports.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.process_memory import resident_bytes
from benchmarks.record import RESULTS, write_csv
from pipeline.plan import load_plan, update_plan
from pipeline.sink import done
from pipeline.source import list_source

PER_FOLDER = 1000


def make_files(root: Path, count: int) -> None:
    """Hard links to one file for each folder."""
    for start in range(0, count, PER_FOLDER):
        folder = root / f"session-{start // PER_FOLDER:04d}"
        folder.mkdir(parents=True)
        first = folder / "photograph-000.jpg"
        first.write_bytes(b"a few bytes")
        for number in range(1, min(PER_FOLDER, count - start)):
            os.link(first, folder / f"photograph-{number:03d}.jpg")


def make_list(root: Path, path: Path) -> None:
    """The files' paths, one per line."""
    with path.open("w", encoding="utf-8") as file:
        for folder, _, names in os.walk(root):
            file.writelines(f"{folder}/{name}\n" for name in names)


def plan_once(source: Path, out: Path) -> None:
    """In a process of its own: prints images left, seconds, peak bytes and those before."""
    before = resident_bytes("VmRSS")
    begun = time.perf_counter()
    update_plan(out, list_source(source))
    left = load_plan(out).without(done(out))
    print(left.image_count, time.perf_counter() - begun, resident_bytes("VmHWM"), before)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--csv", type=Path, default=RESULTS / "planning.csv")
    parser.add_argument("--once", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        return plan_once(*arguments.once)
    rows = []
    print(f"{'source':<8}{'call':<8}{'images':>10}{'seconds':>10}{'peak MB':>10}{'on top MB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_files(work / "files", arguments.count)
        make_list(work / "files", work / "list.txt")
        for name, source in (("folder", work / "files"), ("list", work / "list.txt")):
            for call in ("first", "again"):
                command = [sys.executable, "-m", "benchmarks.planning", "--once", str(source), str(work / name)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                images, seconds, peak, before = int(printed[0]), float(printed[1]), int(printed[2]), int(printed[3])
                print(
                    f"{name:<8}{call:<8}{images:>10}{seconds:>10.1f}{peak / 1e6:>10.0f}{(peak - before) / 1e6:>11.0f}"
                )
                rows.append({
                    "source": name, "call": call, "images": images, "seconds": round(seconds, 1),
                    "peak_bytes": peak, "peak_bytes_on_top": peak - before,
                })  # fmt: skip
    write_csv(arguments.csv, rows)
    return None


if __name__ == "__main__":
    main()
