"""What windows gain: PSNR of photographs restored whole and in tiles of several sizes, by damage.

`python -m benchmarks.windows PHOTOGRAPHS` takes clean photographs that the network was not trained on: of a training's
folder those that are held out. Each is degraded as for training, and restored under its own prompt.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.record import add_csv_option, write_csv
from classifier.labels import Degradation
from jobs.training_data import Photographs
from models import Restorer, load_restorer
from models.restorer import Tile
from pipeline.degradations import CameraNoise, Noise
from pipeline.metrics import psnr_db
from pipeline.prompting import noise_prompt
from pipeline.synthesis import damaged, draw_recipe, from_uint8, to_uint8, well_exposed

Pixels = NDArray[np.uint8]
WHOLE: Tile = "off"


def degraded(clean: Pixels, label: Degradation, rng: np.random.Generator) -> tuple[Pixels, Pixels, str]:
    """A photograph, H x W x 3, as a training degrades it; what is to come of it; and the prompt."""
    wanted = to_uint8(well_exposed(from_uint8(clean))) if label is Degradation.LOWLIGHT else clean
    recipe = draw_recipe(label, rng, *clean.shape[:2])
    prompt = noise_prompt(recipe.sigma_255) if isinstance(recipe, Noise | CameraNoise) else str(label)
    return to_uint8(damaged(from_uint8(wanted), recipe)), wanted, prompt


def main() -> None:
    """Restores every photograph in every way, and writes a row for each damage and size of tile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path, help="folder of a training; the held-out part is used")
    parser.add_argument("--model", default="dfpir-compact")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--labels", nargs="+", default=["noise", "rain", "haze", "blur", "lowlight"])
    parser.add_argument("--tiles", nargs="+", type=int, default=[192, 256, 384, 512])
    parser.add_argument("--least-px", type=int, default=0, help="only photographs with a longer side above this")
    add_csv_option(parser, "windows.csv")
    arguments = parser.parse_args()
    photographs = Photographs.clean((arguments.photographs,), least_readable=0.9).part(validation=True)
    scenes = (np.asarray(picture) for scene in photographs.scenes for picture in scene)
    pictures = [picture for picture in scenes if max(picture.shape) > arguments.least_px]
    if not pictures:
        parser.error(f"no held-out photograph in {arguments.photographs} is that large")
    ways: list[Tile] = [WHOLE, *arguments.tiles]
    restorers: dict[Tile, Restorer] = {
        way: load_restorer(arguments.model, dtype=getattr(torch, arguments.dtype), tile=way) for way in ways
    }
    rows = []
    for label in map(Degradation, arguments.labels):
        gains: dict[Tile, list[float]] = {way: [] for way in ways}
        for number, clean in enumerate(pictures):
            image, wanted, prompt = degraded(clean, label, np.random.default_rng(number))
            for way, restorer in restorers.items():
                restored = restorer.restore([image], [prompt])[0]
                gains[way].append(psnr_db(restored, wanted) - psnr_db(image, wanted))
        for way in ways:
            more = np.subtract(gains[way], gains[WHOLE])
            rows.append(
                {
                    "damage": str(label),
                    "tile_px": "whole" if way == WHOLE else way,
                    "least_px": arguments.least_px,
                    "images": len(pictures),
                    "gain_db": round(float(np.mean(gains[way])), 3),
                    "over_whole_db": round(float(more.mean()), 3),
                    "better": round(float((more > 0).mean()), 3),
                    "model": arguments.model,
                    "dtype": arguments.dtype,
                }
            )
            print(", ".join(str(value) for value in rows[-1].values()), flush=True)
    write_csv(arguments.csv, rows)


if __name__ == "__main__":
    main()
