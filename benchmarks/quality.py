"""Quality of `dfpir restore` on referenced sets, with the label predicted and with it given.

Every set is restored twice through the command line, local engine: once blindly, once with the true label forced.
Means count every image: one that failed or was left alone scores as its input. Clean and labelled sets show what
the classifier decides. Prints a table per set, writes it and one row per image as CSV.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.record import RESULTS, write_csv
from classifier.labels import Degradation
from jobs.datasets import NOISE_SIGMAS_255, read_rgb, with_noise
from jobs.networks import resolve_device
from pipeline.synthesis import convolve, from_uint8, to_uint8

IMAGE_COLUMNS = (
    "relative_path", "status", "label", "confidence", "prompt", "noise_sigma_255",
    "psnr_input_db", "psnr_db", "ssim_input", "ssim",
)  # fmt: skip


@dataclass(frozen=True)
class Set:
    """A folder of images, what is wrong with them, and their references (None: they have none)."""

    name: str
    source: Path
    label: Degradation
    reference: Path | None


def emptied(folder: Path) -> Path:
    """A new folder: what an earlier call made of other photographs is not counted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def noisy(data: Path, work: Path, sigma_255: int) -> Set:
    """CBSD68 with Gaussian noise as the field adds it: fixed seed, clipped, eight bits."""
    folder = emptied(work / f"cbsd68-sigma{sigma_255}")
    for number, path in enumerate(sorted((data / "cbsd68").glob("*.png"))):
        Image.fromarray(with_noise(read_rgb(path), sigma_255, seed=number)).save(folder / path.name)
    return Set(folder.name, folder, Degradation.NOISE, data / "cbsd68")


def blurred(data: Path, work: Path) -> Set:
    """Every `urban` photograph under each of the four measured kernels of Levin et al. 2009."""
    folder, reference = emptied(work / "urban-levin09"), emptied(work / "urban-levin09-reference")
    kernels = np.load(data / "blur_kernels" / "levin09.npz")
    for path in sorted((data / "urban").glob("*.png")):
        clean = from_uint8(read_rgb(path))
        for name in kernels.files:
            blurry = convolve(clean, kernels[name])
            Image.fromarray(to_uint8(blurry)).save(folder / f"{path.stem}-{name}.png")
            shutil.copy(path, reference / f"{path.stem}-{name}.png")
    return Set(folder.name, folder, Degradation.BLUR, reference)


def sets(data: Path, work: Path, wanted: list[str]) -> Iterator[Set]:
    """The sets asked for, by the beginning of their names; none asked for: all."""

    def asked(name: str) -> bool:
        return not wanted or any(name.startswith(beginning) for beginning in wanted)

    for sigma_255 in NOISE_SIGMAS_255:
        if asked(f"cbsd68-sigma{sigma_255}"):
            yield noisy(data, work, sigma_255)
    for name, label in (("rain", "rain"), ("haze", "haze"), ("lowlight", "lowlight"), ("real_noise", "noise")):
        if asked(name):
            yield Set(name, data / name / "degraded", Degradation(label), data / name / "reference")
    if asked("urban-levin09"):
        yield blurred(data, work)
    for name in ("cbsd68", "urban", "large"):
        if asked(f"clean-{name}"):
            yield Set(f"clean-{name}", data / name, Degradation.CLEAN, None)
    for folder in sorted((data / "labelled").glob("*")):
        if asked(f"labelled-{folder.name}"):
            yield Set(f"labelled-{folder.name}", folder, Degradation(folder.name), None)


def restore(source: Path, out: Path, *options: str) -> tuple[dict[str, float | None], dict[str, dict[str, object]]]:
    """Runs the command and returns its summary, and its manifest's rows by relative path."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", "from jobs.cli import main; main()", "restore", str(source), str(out)]
    done = subprocess.run([*command, "--engine", "local", "--json", *options], capture_output=True, text=True)
    if not done.stdout:  # a run that breaks off has the code of one with many failures
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    rows = pq.read_table(out / "manifest").to_pylist()
    return json.loads(done.stdout), {row["relative_path"]: row for row in rows}


def measure(one: Set, work: Path, model: list[str]) -> tuple[dict[str, object], list[dict[str, object]]]:
    """One row for the set and one for each of its images."""
    reference = ["--reference", str(one.reference)] if one.reference else []
    means, blind = restore(one.source, work / "runs" / one.name, "--clean", "skip", *reference, *model)
    means_told: dict[str, float | None] = {}
    told: dict[str, dict[str, object]] = {}
    if one.reference:
        means_told, told = restore(
            one.source, work / "runs" / f"{one.name}-told", "--label", str(one.label), *reference, *model
        )
    right = sum(row["label"] == one.label and row["status"] in ("restored", "copied") for row in blind.values())
    summary: dict[str, object] = {
        "set": one.name,
        "images": len(blind),
        "label": str(one.label),
        "recognised": right / len(blind),
        "psnr_input_db": means["psnr_input_db"],
        "psnr_db": means["psnr_db"],
        "psnr_told_db": means_told.get("psnr_db"),
        "ssim_input": means["ssim_input"],
        "ssim": means["ssim"],
        "ssim_told": means_told.get("ssim"),
    }
    images = [
        {"set": one.name}
        | {name: row[name] for name in IMAGE_COLUMNS}
        | {"psnr_told_db": told.get(path, {}).get("psnr_db")}
        for path, row in sorted(blind.items())
    ]
    return summary, images


def show(value: object, digits: int = 2) -> str:
    """A figure for the table, `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cbsd68/, rain/, haze/, urban/ and so on")
    parser.add_argument("--work", type=Path, required=True, help="folder for degraded images and runs")
    parser.add_argument("--sets", nargs="*", default=[], help="only sets whose names begin so")
    parser.add_argument("--images", action="store_true", help="print a line per image too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    help_text = "one passed on to dfpir restore, e.g. --option=--model=FILE; may be repeated"
    parser.add_argument("--option", action="append", default=[], dest="options", help=help_text)
    arguments = parser.parse_args()
    device = resolve_device("auto")
    print("set                    n  recogn.   input   blind   gain    told  SSIM in  blind")
    for one in sets(arguments.data, arguments.work, arguments.sets):
        row, rows = measure(one, arguments.work, arguments.options)
        gain = None if row["psnr_db"] is None else row["psnr_db"] - row["psnr_input_db"]  # type: ignore[operator]
        print(
            f"{row['set']:<20}{row['images']:>4} {row['recognised']:>8.1%} {show(row['psnr_input_db']):>7} "
            f"{show(row['psnr_db']):>7} {show(gain):>6} {show(row['psnr_told_db']):>7} "
            f"{show(row['ssim_input'], 3):>8} {show(row['ssim'], 3):>6}",
            flush=True,
        )
        if arguments.images:
            for image in rows:
                print(
                    f"    {image['relative_path']:<40} {image['status']:<10} {image['label'] or '-':<9} "
                    f"{show(image['psnr_input_db']):>7} {show(image['psnr_db']):>7} {show(image['psnr_told_db']):>7}"
                )
        write_csv(arguments.results / "quality.csv", [row], device=device, replacing="set")
        write_csv(arguments.results / "quality-images.csv", rows, device=device, replacing="set")


if __name__ == "__main__":
    main()
