"""Prints how often the classifier is right and sure, set by set: `python -m benchmarks.classifier_recall --help`.

The sets are those of the data folder's `test/`, none of which is trained or tuned on. An image counts where its
final decision is the expected label and confident. With `--csv` every image's decision is written too.
"""

import argparse
import csv
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from classifier import load_classifier
from classifier.base import Prediction
from classifier.labels import Degradation
from jobs.datasets import NOISE_SIGMAS_255, with_noise
from jobs.networks import resolve_dtype
from pipeline.synthesis import convolve, from_uint8, to_uint8
from pipeline.worker import WINDOW_IMAGES

Pixels = NDArray[np.uint8]
LABELLED = ("noise", "rain", "haze", "blur", "lowlight", "clean")
SMALL_SIDES_PX = (128, 64, 32)


@dataclass(frozen=True)
class Case:
    """One image of a set, with the label that is expected."""

    group: str
    name: str
    expected: Degradation
    pixels: Pixels


def read(folder: Path) -> Iterator[tuple[str, Pixels]]:
    """The images of a folder by name, H x W x 3 uint8."""
    for path in sorted(folder.iterdir()):
        yield path.name, np.asarray(Image.open(path).convert("RGB"))


def blurred(image: Pixels, kernel: NDArray[np.floating]) -> Pixels:
    """The image under a measured camera-shake kernel, in eight bits."""
    return to_uint8(convolve(from_uint8(image), kernel))


def reduced(image: Pixels, side: int) -> Pixels:
    """The image with so many pixels on its longer side."""
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def cases(test: Path) -> Iterator[Case]:
    """Every image that is counted."""
    for label in LABELLED:
        for name, image in read(test / "labelled" / label):
            yield Case(f"labelled/{label}", name, Degradation(label), image)
    for folder in ("cbsd68", "urban", "large"):
        for name, image in read(test / folder):
            yield Case(f"{folder}, clean", name, Degradation.CLEAN, image)
    kernels = np.load(test / "blur_kernels" / "levin09.npz")
    for name, image in read(test / "urban"):
        for key in sorted(kernels.files):
            yield Case("urban, levin09 blur", f"{name} {key}", Degradation.BLUR, blurred(image, kernels[key]))
    for sigma in NOISE_SIGMAS_255:
        for seed, (name, image) in enumerate(read(test / "cbsd68")):
            yield Case(f"cbsd68, noise {sigma}", name, Degradation.NOISE, with_noise(image, sigma, seed=seed))
    for label in ("rain", "haze", "lowlight"):
        for name, image in read(test / label / "degraded"):
            yield Case(f"{label} pairs", name, Degradation(label), image)
    for name, image in read(test / "real_noise" / "degraded"):
        yield Case("real_noise", name, Degradation.NOISE, image)
    for label in ("rain", "haze", "lowlight", "noise"):
        for name, image in read(test / "real_unpaired" / label):
            yield Case(f"real_unpaired/{label}", name, Degradation(label), image)


def small_cases(test: Path) -> Iterator[Case]:
    """Photographs with few pixels, clean and noisy, which would sway the time per megapixel."""
    for side in SMALL_SIDES_PX:
        smaller = [(name, reduced(image, side)) for name, image in read(test / "cbsd68")]
        for name, image in smaller:
            yield Case(f"cbsd68, clean, {side} px", name, Degradation.CLEAN, image)
        for seed, (name, image) in enumerate(smaller):
            yield Case(f"cbsd68, noise 25, {side} px", name, Degradation.NOISE, with_noise(image, 25, seed=seed))


def table(decided: Iterable[tuple[Case, Prediction]]) -> Iterator[str]:
    """One line per set: images, share right and sure, share right, and what the others were taken for."""
    groups: dict[str, list[tuple[Case, Prediction]]] = {}
    for case, prediction in decided:
        groups.setdefault(case.group, []).append((case, prediction))
    yield f"{'set':24s} {'images':>6s} {'right and sure':>14s} {'right':>6s}  taken for"
    for group, members in groups.items():
        right = [p.label == c.expected for c, p in members]
        sure = [p.label == c.expected and p.confident for c, p in members]
        others = Counter(f"{p.label}{'' if p.confident else '?'}" for c, p in members)
        expected = str(members[0][0].expected)
        rest = ", ".join(f"{name} {count}" for name, count in others.most_common() if name != expected)
        yield f"{group:24s} {len(members):6d} {np.mean(sure):14.1%} {np.mean(right):6.1%}  {rest}"


def rows(decided: Iterable[tuple[Case, Prediction]]) -> Iterator[list[str]]:
    """A header and one row per image."""
    labels = list(Degradation)
    yield ["set", "name", "expected", "label", "confident", *map(str, labels), "noise_sigma_255"]
    for case, p in decided:
        shares = [f"{p.probabilities[label]:.4f}" for label in labels]
        yield [case.group, case.name, case.expected, p.label, str(p.confident), *shares, f"{p.noise_sigma_255:.2f}"]


def timed(
    predict: Callable[[list[Pixels]], list[Prediction]], counted: Iterable[Case], *, together: int
) -> tuple[list[tuple[Case, Prediction]], float]:
    """Predictions, and the seconds they took per megapixel, asked for so many images at once."""
    decided: list[tuple[Case, Prediction]] = []
    seconds, pixels, waiting = 0.0, 0, iter(counted)
    while window := list(islice(waiting, together)):
        started = time.perf_counter()
        found = predict([case.pixels for case in window])
        seconds += time.perf_counter() - started
        decided += zip(window, found, strict=True)
        pixels += sum(case.pixels.shape[0] * case.pixels.shape[1] for case in window)
    return decided, seconds / pixels * 1e6


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data folder, with test/ in it")
    parser.add_argument("--classifier", default="degradation-small", help="name or path")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--csv", type=Path, help="file for every image's decision")
    arguments = parser.parse_args()
    dtype = resolve_dtype(arguments.dtype, arguments.device)
    classifier = load_classifier(arguments.classifier, device=arguments.device, dtype=getattr(torch, dtype))
    test, together = arguments.data / "test", WINDOW_IMAGES[torch.device(arguments.device).type]
    decided, seconds_per_megapixel = timed(classifier.predict, cases(test), together=together)
    decided += timed(classifier.predict, small_cases(test), together=together)[0]
    print("\n".join(table(decided)))
    print(
        f"{seconds_per_megapixel * 1e3:.0f} ms/MP on {arguments.device} in {dtype}, {torch.get_num_threads()} threads,",
        end=" ",
    )
    print(f"{classifier.name} {classifier.sha256[:12]}")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows(rows(decided))


if __name__ == "__main__":
    main()
