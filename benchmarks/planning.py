"""Time and memory of `dfpir plan` over a large source: `python -m benchmarks.planning --help`.

Makes that many real files in folders of a thousand, and a list that names them, and plans each; then the same again,
when nothing has changed. Time and peak memory are those of the whole command, in which torch alone holds half a
gigabyte, and which loads the networks to measure their speed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import add_csv_option, write_csv
from jobs.networks import resolve_device

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


def plan(source: Path, out: Path) -> tuple[int, float, int]:
    """Images left, seconds, and peak bytes of one call."""
    begun = time.perf_counter()
    main = "from jobs.cli import main; main()"
    command = [sys.executable, "-c", main, "plan", str(source), str(out), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return json.loads(printed)["left"], time.perf_counter() - begun, usage.ru_maxrss * 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    add_csv_option(parser, "planning.csv")
    arguments = parser.parse_args()
    rows = []
    print(f"{'source':<8}{'call':<8}{'images':>10}{'seconds':>10}{'peak MB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_files(work / "files", arguments.count)
        make_list(work / "files", work / "list.txt")
        for name, source in (("folder", work / "files"), ("list", work / "list.txt")):
            for call in ("first", "again"):
                images, seconds, peak = plan(source, work / name)
                print(f"{name:<8}{call:<8}{images:>10}{seconds:>10.1f}{peak / 1e6:>10.0f}", flush=True)
                rows.append({
                    "source": name, "call": call, "images": images, "seconds": round(seconds, 1), "peak_bytes": peak,
                })  # fmt: skip
    write_csv(arguments.csv, rows, device=resolve_device("auto"))


if __name__ == "__main__":
    main()
