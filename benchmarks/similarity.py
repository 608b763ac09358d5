"""SSIM in this project's way and in scikit-image's: processor time, and how far apart they are.

`python -m benchmarks.similarity PHOTOGRAPHS` compares every photograph of a folder with itself under noise, in both
ways in turn, on one thread. scikit-image's time is divided into the other's.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity

from benchmarks.record import RESULTS, spread, write_csv
from jobs.datasets import is_photograph
from pipeline.metrics import ssim

Pixels = NDArray[np.uint8]


def main() -> None:
    """Times both ways on every photograph, and writes a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--most", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=RESULTS / "similarity.csv", help="rows are added")
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.photographs.iterdir() if is_photograph(path))
    if not paths:
        parser.error(f"no photographs in {arguments.photographs}")
    pairs = [_pair(path) for path in paths[: arguments.most]]
    megapixels = sum(one[..., 0].size for one, _ in pairs) / 1e6
    ways = {"scikit-image": _of_scikit_image, "pipeline.metrics": ssim}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, NDArray[np.float64]] = {}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            started = time.process_time()
            found[name] = np.array([way(*pair) for pair in pairs], np.float64)
            seconds[name].append(time.process_time() - started)
    first = np.array(seconds["scikit-image"])
    rows = []
    for name, own in seconds.items():
        rows.append(
            {
                "photographs": len(pairs),
                "megapixels": round(megapixels, 2),
                "way": name,
                "ms_per_megapixel": round(1000 * float(np.median(own)) / megapixels, 1),
                **spread((first / own).tolist()),
                "largest_difference": f"{np.abs(found[name] - found['scikit-image']).max():.1e}",
            }
        )
        print(", ".join(str(value) for value in rows[-1].values()), flush=True)
    write_csv(arguments.csv, rows, add=True)


def _pair(path: Path) -> tuple[Pixels, Pixels]:
    """A photograph, and the same under noise of sigma 15."""
    with Image.open(path) as image:
        clean = np.array(image.convert("RGB"))
    noise = np.random.default_rng(0).normal(0, 15, clean.shape)
    return clean, np.clip(clean + noise, 0, 255).astype(np.uint8)


def _of_scikit_image(one: Pixels, two: Pixels) -> float:
    x, y = (image.astype(np.float32) / np.float32(255) for image in (one, two))
    found = structural_similarity(
        x, y, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
    )
    return float(found)


if __name__ == "__main__":
    main()
