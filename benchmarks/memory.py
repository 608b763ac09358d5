"""Memory of every process of a run as images get done: `python -m benchmarks.memory --help`. Linux only.

Restores many small noisy photographs by the command line and looks at the command's processes while it goes on. What
grows from the first mark to the last would grow without end over a million images.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from benchmarks.process_memory import resident_bytes
from benchmarks.record import add_csv_option, write_csv
from jobs.datasets import with_noise
from jobs.networks import resolve_device

COMMAND = [sys.executable, "-c", "from jobs.cli import main; main()"]
POLL_S = 0.5


def make_photographs(folder: Path, count: int, side_px: int) -> None:
    """Pieces of a photograph with noise of sigma 25, as PNG, in folders of a thousand."""
    photograph = data.astronaut()
    for number in range(count):
        top, left = np.random.default_rng(number).integers(0, 512 - side_px, 2)
        piece = photograph[top : top + side_px, left : left + side_px]
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(with_noise(piece, 25, seed=number)).save(path)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        with suppress(OSError):
            found += family(int(child))
    return found


def name_of(pid: int) -> str:
    """The driver, a worker, or what else the command line tells."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    if "spawn_main" in " ".join(words):
        return f"worker {pid}"
    if words[0].startswith("ray::"):
        return f"{words[0]} {pid}"
    return f"{Path(words[0]).name} {pid}"


def look(driver: int) -> dict[str, int]:
    """Resident bytes of each process, by name."""
    held = {}
    for pid in family(driver):
        with suppress(OSError, StopIteration):
            held["driver" if pid == driver else name_of(pid)] = resident_bytes("VmRSS", pid)
    return held


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--marks", type=int, nargs="+", default=[1000, 2000, 5000, 9900])
    parser.add_argument("--side", type=int, default=64, help="pixels")
    parser.add_argument("--engine", default="local")
    add_csv_option(parser, "memory.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "src", Path(folder) / "out"
        make_photographs(source, arguments.count, arguments.side)
        run = subprocess.Popen([*COMMAND, "restore", str(source), str(out), "--engine", arguments.engine])
        seen: dict[int, dict[str, int]] = {}
        marks = sorted(arguments.marks)
        while run.poll() is None and marks:
            finished = sum(1 for _ in out.glob("images/*/*.png"))
            if finished >= marks[0]:
                seen[marks.pop(0)] = look(run.pid)
            time.sleep(POLL_S)
        if code := run.wait():
            raise SystemExit(f"the run ended with {code}")
    rows = [
        {"engine": arguments.engine, "process": name.split()[0], "images_done": mark, "resident_bytes": held}
        for name in sorted({name for held in seen.values() for name in held})
        for mark in seen
        if (held := seen[mark].get(name)) is not None
    ]
    for row in rows:
        print(f"{row['process']:<30}{row['images_done']:>8}{row['resident_bytes'] / 1e6:>10.0f} MB")
    write_csv(arguments.csv, rows, device=resolve_device("auto"), replacing="engine")


if __name__ == "__main__":
    main()
