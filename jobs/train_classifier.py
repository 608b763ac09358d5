"""Trains the classifier that ships with the project: `python -m jobs.train_classifier --help`.

One process. Photographs are degraded whole, then seen through the same crops and thumbnail as in use. Views
are kept in a pool of which every step renews a little, because synthesis costs more than a training step.
A run stops after `--max-minutes` and goes on from its last checkpoint when started again; `--export` writes
the calibrated weights.
"""

import argparse
import io
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from classifier.labels import CLEAN_LIMITS, LABELS, Degradation
from classifier.network import Architecture, DegradationNetwork, to_input
from classifier.view import ViewSettings, take_views
from jobs.training_data import CleanPhotographs
from pipeline.synthesis import (
    FloatImage,
    add_haze,
    add_lowlight,
    add_motion_blur,
    add_noise,
    add_other,
    add_rain,
    to_uint8,
    vary_clean,
)

log = logging.getLogger("train_classifier")

SHARES: dict[Degradation, float] = {
    Degradation.NOISE: 0.12,
    Degradation.RAIN: 0.14,
    Degradation.HAZE: 0.13,
    Degradation.BLUR: 0.14,
    Degradation.LOWLIGHT: 0.12,
    Degradation.CLEAN: 0.22,
    Degradation.OTHER: 0.13,
}
"""Share of each label in the samples; `clean` is what every kind of damage must be told from."""


def draw_scene(photographs: CleanPhotographs, rng: np.random.Generator) -> FloatImage:
    """A photograph or a part of one, H x W x 3 in [0, 1], sides from 160 to 640 px, at native or reduced scale.

    Native scale shows how soft camera originals are, reduced scale how sharp downsized photographs are.
    """
    image = photographs.images[rng.integers(len(photographs.images))]
    height, width = image.shape[:2]
    kind = rng.random()
    if kind < 0.35:
        scale = float(np.exp(rng.uniform(np.log(224), np.log(480)))) / min(height, width)
        source_height, source_width = height, min(width, 2 * height)
    else:
        scale = 1.0 if kind > 0.75 else float(np.exp(rng.uniform(np.log(0.35), 0)))
        sides = np.exp(rng.uniform(np.log(224), np.log(512), 2)) / scale
        source_height, source_width = min(height, round(sides[0])), min(width, round(sides[1]))
    top = rng.integers(height - source_height + 1)
    left = rng.integers(width - source_width + 1)
    part = image[top : top + source_height, left : left + source_width]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if scale != 1.0:
        size = max(160, round(source_width * scale)), max(160, round(source_height * scale))
        part = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.LANCZOS))
    return part.astype(np.float32) / np.float32(255)


def damage(image: FloatImage, label: Degradation, rng: np.random.Generator) -> FloatImage:
    """The image under a label, in wider ranges than a restorer trains on: what cannot be restored well is still seen.

    Noise starts above the limit of `CleanLimits`, so that a gap parts it from grainy clean photographs.
    """
    match label:
        case Degradation.NOISE:
            return add_noise(image, rng, sigma_255=float(rng.uniform(1.2 * CLEAN_LIMITS.noise_sigma_255, 60)))
        case Degradation.RAIN:
            return add_rain(image, rng, spread_deg=float(rng.choice([3.0, 15.0])))
        case Degradation.HAZE:
            return add_haze(image, rng, tint=float(rng.choice([0.04, 0.12])))
        case Degradation.BLUR:
            return add_motion_blur(image, rng, longest_px=60)
        case Degradation.LOWLIGHT:
            return add_lowlight(image, rng, lowest_gain=0.05)
        case Degradation.CLEAN:
            return vary_clean(image, rng)
        case Degradation.OTHER:
            return add_other(image, rng)


def as_filed(image: FloatImage, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The image in eight bits, in two of five cases after JPEG of a quality that still counts as clean."""
    pixels = to_uint8(image)
    if rng.random() < 0.6:
        return pixels
    buffer = io.BytesIO()
    quality = int(rng.integers(CLEAN_LIMITS.jpeg_quality + 12, 97))
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=int(rng.choice([0, 2])))
    return np.asarray(Image.open(buffer).convert("RGB"))


@dataclass
class Samples:
    """Views of many images in preallocated memory: crops M N P P 3 and thumbnails M T T 3 uint8, labels M int64."""

    crops: NDArray[np.uint8]
    thumbnails: NDArray[np.uint8]
    labels: NDArray[np.int64]
    filled: int = 0
    written: int = 0

    @classmethod
    def empty(cls, size: int, view: ViewSettings) -> "Samples":
        """Room for `size` samples."""
        return cls(
            np.empty((size, view.crops, view.crop_px, view.crop_px, 3), np.uint8),
            np.empty((size, view.thumbnail_px, view.thumbnail_px, 3), np.uint8),
            np.empty(size, np.int64),
        )

    def synthesise(
        self, photographs: CleanPhotographs, rng: np.random.Generator, *, count: int, view: ViewSettings
    ) -> None:
        """Adds `count` samples, in the place of the oldest once there is no room."""
        shares = np.array([SHARES[label] for label in LABELS])
        for label in rng.choice(len(LABELS), size=count, p=shares / shares.sum()):
            pixels = as_filed(damage(draw_scene(photographs, rng), LABELS[label], rng), rng)
            views = take_views(pixels, view)
            place = self.written % len(self.labels)
            self.crops[place], self.thumbnails[place] = views.crops, views.thumbnail
            self.labels[place] = label
            self.written += 1
            self.filled = min(self.written, len(self.labels))

    def batch(self, chosen: NDArray[np.integer]) -> tuple[Tensor, Tensor, Tensor]:
        """Crops, thumbnails (network inputs) and labels of the chosen samples."""
        crops, thumbnails = torch.from_numpy(self.crops[chosen]), torch.from_numpy(self.thumbnails[chosen])
        return to_input(crops), to_input(thumbnails), torch.from_numpy(self.labels[chosen])


def flipped(crops: Tensor, thumbnails: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The views mirrored left to right, and the crops top to bottom, each at random for the whole batch."""
    if rng.random() < 0.5:
        crops, thumbnails = crops.flip(-1), thumbnails.flip(-1)
    return (crops.flip(-2), thumbnails) if rng.random() < 0.5 else (crops, thumbnails)


@torch.no_grad()
def all_logits(network: DegradationNetwork, samples: Samples) -> tuple[Tensor, Tensor]:
    """Logits (M x labels, float32) of every sample, and the labels."""
    network.eval()
    logits = [
        network(*samples.batch(np.arange(start, min(start + 32, samples.filled)))[:2])
        for start in range(0, samples.filled, 32)
    ]
    network.train()
    return torch.cat(logits), torch.from_numpy(samples.labels[: samples.filled])


def validate(network: DegradationNetwork, samples: Samples) -> str:
    """Recall by label and cross-entropy on the held-out samples, for the log."""
    logits, labels = all_logits(network, samples)
    right = logits.argmax(dim=1) == labels
    recall = {str(name): round(float(right[labels == i].float().mean()), 3) for i, name in enumerate(LABELS)}
    return f"cross-entropy {float(F.cross_entropy(logits, labels)):.4f}, recall {recall}"


def learning_rate(progress: float, *, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine to a hundredth of the peak."""
    if progress < 0.03:
        return peak * (progress + 1e-3) / 0.03
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0))))


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that a failure leaves the previous one whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


@torch.no_grad()
def follow(average: DegradationNetwork, network: DegradationNetwork, *, decay: float) -> None:
    """Moves the averaged weights, and the statistics of the batch norms, towards the current ones."""
    current = network.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[name], 1 - decay)


def train(arguments: argparse.Namespace) -> DegradationNetwork:
    """Runs or resumes a training, whose state lies in `arguments.out`; returns the averaged network."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    view = ViewSettings()
    photographs = CleanPhotographs.load(arguments.data, validation=False)
    held_out = Samples.empty(arguments.validation_samples, view)
    held_out.synthesise(
        CleanPhotographs.load(arguments.data, validation=True),
        np.random.default_rng(7), count=arguments.validation_samples, view=view,
    )  # fmt: skip
    network = DegradationNetwork(Architecture()).to(memory_format=torch.channels_last)
    average = DegradationNetwork(Architecture()).to(memory_format=torch.channels_last).requires_grad_(False)
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.lr, weight_decay=0.02, fused=True)
    step, before = 0, 0.0
    if arguments.out.exists():
        state = torch.load(arguments.out, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
        log.info("resumed at step %d", step)
    pool = Samples.empty(arguments.pool, view)
    rng = np.random.default_rng([arguments.seed, step])
    started, last_save, losses, seconds = time.monotonic(), time.monotonic(), [], before

    def save() -> None:
        state = {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        save_atomically({**state, "step": step, "seconds": seconds}, arguments.out)

    while (progress := seconds / 60 / arguments.max_minutes) < 1 and step < arguments.steps:
        missing = max(arguments.fresh, arguments.first_fill - pool.filled)
        pool.synthesise(photographs, rng, count=missing, view=view)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak=arguments.lr)
        crops, thumbnails, labels = pool.batch(rng.integers(pool.filled, size=arguments.batch))
        crops, thumbnails = flipped(crops, thumbnails, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(crops, thumbnails)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {step}; last good checkpoint: {arguments.out}")
        optimizer.step()
        step += 1
        follow(average, network, decay=min(0.995, step / (step + 20)))
        losses.append(float(loss.detach()))
        seconds = before + time.monotonic() - started
        if step % 50 == 0:
            log.info("step %d, %.1f min, %d samples synthesised, loss %.4f", step, seconds / 60, pool.written,
                     np.mean(losses[-50:]))  # fmt: skip
        if time.monotonic() - last_save > arguments.save_every_s:
            last_save = time.monotonic()
            save()
            log.info("validation: %s", validate(average, held_out))
    save()
    log.info("ended at step %d after %.1f min; validation: %s", step, seconds / 60, validate(average, held_out))
    return average


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint (.pt) to write and to resume from")
    parser.add_argument("--max-minutes", type=float, default=45.0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--pool", type=int, default=16_000, help="samples kept in memory")
    parser.add_argument("--first-fill", type=int, default=1200, help="samples made before the first step")
    parser.add_argument("--fresh", type=int, default=8, help="samples renewed every step")
    parser.add_argument("--validation-samples", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every-s", type=float, default=240.0)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
