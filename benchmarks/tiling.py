"""Three ways to restore an image in pieces, held against each other: `python -m benchmarks.tiling --help`.

DFPIR's attention spans the image. Row bands keep that (`models.inference`). Tiles restore each piece with its own
attention. Tiles may also all take the attention maps of one smaller image: a thumbnail of the whole, or the tile in the
middle. Photographs get noise of sigma 25 or synthetic haze; the table has the mean PSNR against the clean ones, the
difference from the whole-image result, and the peak memory for the largest photograph, in a process of its own.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.engine import network_and_bank, padded_tensor
from benchmarks.process_memory import peak_bytes
from benchmarks.record import add_csv_option, write_csv
from jobs.datasets import with_noise
from models import bands
from models.inference import InferenceDFPIR
from models.padding import padded_size
from models.tiling import run_tiled
from pipeline.degradations import Haze
from pipeline.metrics import psnr_db
from pipeline.synthesis import damaged as with_recipe
from pipeline.synthesis import from_uint8, to_uint8

VARIANTS = ("bands", "tiles 512", "tiles 256", "tiles 512, thumbnail's attention", "tiles 512, middle tile's attention")
BASELINE = VARIANTS[0]


class SharedAttention(bands.Similarity):
    """Similarities that are noted in one pass of the network and given back in others, in their order."""

    noted: list[Tensor]
    replay: Iterator[Tensor] | None = None

    def logits(self, temperature: Tensor) -> Tensor:
        """Those of this pass, or the noted ones."""
        if SharedAttention.replay is not None:
            return next(SharedAttention.replay)
        found = super().logits(temperature)
        SharedAttention.noted.append(found)
        return found


def sharing(model: Tensor, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`run` with the attention that it has on `model`, an image of its own."""
    original = bands.Similarity
    bands.Similarity = SharedAttention  # type: ignore[misc]
    try:
        SharedAttention.noted, SharedAttention.replay = [], None
        run(model)
        noted = SharedAttention.noted
    finally:
        bands.Similarity = original  # type: ignore[misc]

    def shared(image: Tensor) -> Tensor:
        bands.Similarity = SharedAttention  # type: ignore[misc]
        try:
            SharedAttention.replay = iter(noted)
            return run(image)
        finally:
            bands.Similarity = original  # type: ignore[misc]

    return shared


def restored(variant: str, run: Callable[[Tensor], Tensor], image: Tensor, multiple: int) -> Tensor:
    """1 x 3 x H x W in and out."""
    if variant == "bands":
        return run(image)
    side = int(variant.split(",")[0].removeprefix("tiles "))
    height, width = image.shape[2:]
    if variant.endswith("thumbnail's attention"):
        scale = side / max(height, width)
        small = padded_size(round(height * scale), round(width * scale), multiple)
        run = sharing(F.interpolate(image, small, mode="bilinear", antialias=True), run)
    elif variant.endswith("middle tile's attention"):
        top, left = ((length - min(side, length)) // 2 for length in (height, width))
        run = sharing(image[:, :, top : top + side, left : left + side], run)
    return run_tiled(image[0], run, tile_px=side, multiple=multiple, batch_limit=1)[None]


def damaged(clean: np.ndarray[Any, Any], damage: str, number: int) -> np.ndarray[Any, Any]:
    """H x W x 3 uint8 with noise or haze."""
    if damage == "noise":
        return with_noise(clean, 25, seed=number)
    return to_uint8(with_recipe(from_uint8(clean), Haze.draw(np.random.default_rng(number), *clean.shape[:2])))


def runner(arguments: argparse.Namespace, damage: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """The inference form under the damage's prompt, and the network's size multiple."""
    network, bank = network_and_bank(arguments.model)
    form = InferenceDFPIR(network, bank, dtype=getattr(torch, arguments.dtype))
    prompts = torch.tensor(bank.indices(["noise25" if damage == "noise" else damage]))
    return lambda image: form(image, prompts), network.config.size_multiple


@torch.inference_mode()
def print_peak(arguments: argparse.Namespace) -> None:
    """Peak bytes per pixel of one variant on the largest photograph, beyond what was held before it."""
    path = max((p for folder in arguments.folders for p in folder.iterdir()), key=lambda p: np.prod(Image.open(p).size))
    run, multiple = runner(arguments, "noise")
    image = padded_tensor(np.asarray(Image.open(path).convert("RGB")), multiple)
    run(image[:, :, : 2 * multiple, : 2 * multiple].clone())
    peak = peak_bytes(lambda: restored(arguments.peak_of, run, image, multiple))
    print(peak / (image.shape[2] * image.shape[3]))


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of clean photographs")
    parser.add_argument("--model", default="dfpir-compact")
    parser.add_argument("--dtype", default="bfloat16")
    add_csv_option(parser, "tiling.csv")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        return print_peak(arguments)
    rows = []
    peaks = {
        variant: float(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.tiling", *map(str, arguments.folders), "--peak-of", variant,
                 "--model", arguments.model, "--dtype", arguments.dtype],
                check=True, stdout=subprocess.PIPE, text=True,
            ).stdout
        )
        for variant in VARIANTS
    }  # fmt: skip
    print(f"{'set':<8}{'damage':<8}{'variant':<36}{'PSNR':>7}{'to whole':>10}{'bytes/px':>10}")
    for folder in arguments.folders:
        for damage in ("noise", "haze"):
            run, multiple = runner(arguments, damage)
            scores: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            drifts: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            for number, path in enumerate(sorted(folder.iterdir())):
                clean = np.asarray(Image.open(path).convert("RGB"))
                image = padded_tensor(damaged(clean, damage, number), multiple)
                results: dict[str, np.ndarray[Any, Any]] = {}
                for variant in VARIANTS:
                    pixels = restored(variant, run, image, multiple)[0, :, : clean.shape[0], : clean.shape[1]]
                    results[variant] = to_uint8(pixels.permute(1, 2, 0).numpy())
                    scores[variant].append(psnr_db(clean, results[variant]))
                    drifts[variant].append(psnr_db(results[BASELINE], results[variant]))
            for variant in VARIANTS:
                row = {
                    "set": folder.name, "damage": damage, "variant": variant, "images": len(scores[variant]),
                    "psnr_db": round(float(np.mean(scores[variant])), 3),
                    "psnr_to_whole_db": round(float(np.mean(drifts[variant])), 2),
                    "peak_bytes_per_pixel": round(peaks[variant], 1), "model": arguments.model,
                    "dtype": arguments.dtype,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{folder.name:<8}{damage:<8}{variant:<36}{row['psnr_db']:>7.2f}{row['psnr_to_whole_db']:>10.1f}"
                    f"{row['peak_bytes_per_pixel']:>10.0f}",
                    flush=True,
                )
    write_csv(arguments.csv, rows)
    return None


if __name__ == "__main__":
    main()
