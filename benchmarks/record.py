"""Results as CSV, with the hardware, versions and commit they were measured on."""

import argparse
import csv
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def hardware(device: str) -> str:
    """The GPU, or for `cpu` the processor, with what it has for products: virtual ones hide their model."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    has = torch.cpu.get_capabilities()
    native = [feature for feature in ("amx_bf16", "avx512_bf16") if has.get(feature, False)]
    return f"{name}, {native[0] if native else torch.backends.cpu.get_cpu_capability().lower()}"


def commit() -> str:
    """That of the checkout with this script, `-dirty` behind it if its code was changed; `unknown` outside one."""
    name = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return (name or "unknown") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Columns of what was measured in rounds: the median, the lowest and the highest ratio."""
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return {"ratio": round(median, 3), "ratio_low": round(low, 3), "ratio_high": round(high, 3)}


def add_csv_option(parser: argparse.ArgumentParser, name: str) -> None:
    """`--csv FILE`, by default the file of this name among the results."""
    text = f"default: the {name} of benchmarks/results is replaced"
    parser.add_argument("--csv", type=Path, default=RESULTS / name, help=text)


def write_csv(
    path: Path,
    rows: Sequence[Mapping[str, object]],
    *,
    device: str = "cpu",
    add: bool = False,
    replacing: str | None = None,
) -> None:
    """Writes rows of the same columns, measured on `device`, instead of what the file has, or of a part of it.

    With `add` they come behind those that the file has; so they do with `replacing`, the name of a column, but for rows
    that have a value there that one of the new rows has. A column that only some of them have is empty in the others:
    what took hours to measure is not lost over it. Ends the process if there are no rows.
    """
    import torch  # here, so that a process that measures its own memory need not hold it

    if not rows:
        raise SystemExit(f"nothing was measured; {path} stays as it is")
    where = {"hardware": hardware(device), "torch": torch.__version__, "commit": commit()}
    kept: list[Mapping[str, object]] = []
    if path.exists() and (add or replacing):
        with path.open(newline="", encoding="utf-8") as file:
            kept += csv.DictReader(file)
    if replacing:
        new = {str(row[replacing]) for row in rows}
        kept = [row for row in kept if row.get(replacing) not in new]
    names = dict.fromkeys([*rows[0], *(kept[0] if kept else ())])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(name for name in names if name not in where), *where])
        writer.writeheader()
        writer.writerows([*kept, *({**row, **where} for row in rows)])
