"""The demonstration: real photographs, degraded on the spot, restored blindly, measured against the originals."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from skimage import data

from classifier.labels import Degradation
from jobs import display
from jobs.config import read_options
from jobs.errors import InterruptedBySignalError, RunError, UsageError
from jobs.places import locked, sole_driver
from jobs.progress import ProgressView
from jobs.restore import make_runner, prepare, run
from jobs.sheets import side_by_side
from pipeline.degradations import Haze, LowLight, MotionBlur, Noise, Rain
from pipeline.sink import read_manifest
from pipeline.synthesis import FloatImage, damaged, from_uint8, to_uint8

MARKER = "dfpir-demo.json"
LABELS = (
    Degradation.NOISE,
    Degradation.RAIN,
    Degradation.HAZE,
    Degradation.LOWLIGHT,
    Degradation.BLUR,
    Degradation.CLEAN,
)


@dataclass(frozen=True)
class Result:
    """Means over the demonstration's images of one kind of damage."""

    damage: str
    images: int
    recognised: int
    psnr_input_db: float
    psnr_db: float
    ssim_input: float
    ssim: float


def photographs() -> dict[str, NDArray[np.uint8]]:
    """Colour photographs inside the scikit-image package, H x W x 3 uint8."""
    return {
        "astronaut": data.astronaut(),
        "coffee": data.coffee(),
        "chelsea": data.chelsea(),
        "motorcycle": data.stereo_motorcycle()[0],
    }


def degrade_for_demo(image: FloatImage, damage: Degradation, rng: np.random.Generator) -> FloatImage:
    """One typical strength of each damage; `clean` comes back as it is."""
    match damage:
        case Degradation.NOISE:
            return damaged(image, Noise.draw(rng, sigma_255=25.0))
        case Degradation.RAIN:
            return damaged(image, Rain.draw(rng, *image.shape[:2]))
        case Degradation.HAZE:
            return damaged(image, Haze.draw(rng, *image.shape[:2]))
        case Degradation.LOWLIGHT:
            return damaged(image, LowLight.draw(rng))
        case Degradation.BLUR:
            return damaged(image, MotionBlur.draw(rng))
        case _:
            return image


def run_demo(out: Path, *, engine: str, messages: Console, results: Console) -> list[Result]:
    """Writes source/, reference/, run/ and before-after.png into `out`, prints the table and returns it.

    An earlier demonstration in `out` is replaced; any other folder with content is refused, and one that another
    process is working on.

    Raises RunError if an image failed, which then has nothing to measure.
    """
    options = read_options(None, {"reference": out / "reference", "engine": engine})
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UsageError(f"{out} is not empty and is no earlier demonstration; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / MARKER, out):
        for name in ("source", "reference", "run"):
            shutil.rmtree(out / name, ignore_errors=True)
        _write_photographs(out)
        with sole_driver(out / "source", out / "run"):
            job = prepare(out / "source", out / "run", options)
            display.before(messages, job, options)
            try:
                with ProgressView(messages, total=job.planned, done=0) as progress:
                    summary = run(job, make_runner(options), on_outcomes=progress)
            except InterruptedBySignalError as end:
                raise InterruptedBySignalError(end.signal_number, goes_on=False) from end
        display.after(results, summary)
        if summary.failed_fraction:
            raise RunError(
                f"{summary.failed_fraction:.1%} of the images failed, see above; the same command begins anew"
            )
        rows = read_manifest(out / "run").to_pylist()
        table = [_result(damage, rows) for damage in LABELS]
        _print(table, results)
        _write_sheet(out, rows)
        results.print(f"before and after: {out / 'before-after.png'}", markup=False, soft_wrap=True)
        (out / MARKER).write_text(json.dumps([vars(row) for row in table], indent=2) + "\n", encoding="utf-8")
    return table


def _write_photographs(out: Path) -> None:
    for number, damage in enumerate(LABELS):
        for folder in ("source", "reference"):
            (out / folder / damage).mkdir(parents=True, exist_ok=True)
        for index, (name, image) in enumerate(photographs().items()):
            rng = np.random.default_rng([2026, number, index])
            degraded = degrade_for_demo(from_uint8(image), damage, rng)
            Image.fromarray(to_uint8(degraded)).save(out / "source" / damage / f"{name}.png")
            Image.fromarray(image).save(out / "reference" / damage / f"{name}.png")


def _of_damage(rows: list[dict[str, Any]], damage: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["relative_path"].startswith(f"{damage}/")]


def _result(damage: Degradation, rows: list[dict[str, Any]]) -> Result:
    mine = _of_damage(rows, damage)

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in mine]))

    return Result(
        damage=str(damage),
        images=len(mine),
        recognised=sum(row["label"] == damage for row in mine),
        psnr_input_db=mean("psnr_input_db"),
        psnr_db=mean("psnr_db"),
        ssim_input=mean("ssim_input"),
        ssim=mean("ssim"),
    )


def _print(results: list[Result], console: Console) -> None:
    table = Table(title="Restored without being told the damage (PSNR in dB)", title_justify="left", box=box.SIMPLE)
    table.add_column("damage")
    for name in ("images", "found", "PSNR in", "out", "gain", "SSIM in", "out"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            row.damage, str(row.images), str(row.recognised), f"{row.psnr_input_db:.2f}", f"{row.psnr_db:.2f}",
            f"{row.psnr_db - row.psnr_input_db:+.2f}", f"{row.ssim_input:.3f}", f"{row.ssim:.3f}",
        )  # fmt: skip
    console.print(table)


def _write_sheet(out: Path, rows: list[dict[str, Any]]) -> None:
    sheet = []
    for damage in LABELS:
        row = _of_damage(rows, damage)[0]
        kept = out / "run" / row["output_uri"]
        cells = [
            (f"{damage}: {row['psnr_input_db']:.1f} dB", out / "source" / row["relative_path"]),
            (f"{row['status']} as {row['label']}: {row['psnr_db']:.1f} dB", kept),
            ("original", out / "reference" / row["relative_path"]),
        ]
        sheet.append([(caption, np.asarray(Image.open(path).convert("RGB"))) for caption, path in cells])
    side_by_side(sheet, cell_px=320).save(out / "before-after.png")
