"""Training samples of the classifier: photographs degraded whole, seen through crops and thumbnail as in use."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from classifier.labels import CLEAN_LIMITS, LABELS, Degradation
from classifier.network import to_input
from classifier.view import ViewSettings, take_views
from jobs.training_data import Photographs
from pipeline.synthesis import (
    FloatImage,
    add_camera_noise,
    add_deep_shadow,
    add_haze,
    add_lowlight,
    add_motion_blur,
    add_noise,
    add_other,
    add_rain,
    resize,
    to_uint8,
    vary_clean,
)

SHARES: dict[Degradation, float] = {
    Degradation.NOISE: 0.1,
    Degradation.RAIN: 0.13,
    Degradation.HAZE: 0.13,
    Degradation.BLUR: 0.12,
    Degradation.LOWLIGHT: 0.14,
    Degradation.CLEAN: 0.28,
    Degradation.OTHER: 0.1,
}
"""Share of each label in the samples; `clean` is what every kind of damage must be told from."""


def draw_scene(photographs: Photographs, rng: np.random.Generator) -> FloatImage:
    """A photograph or a part of one, H x W x 3 in [0, 1], sides from 160 to 640 px, at native or reduced scale.

    Native scale shows how soft camera originals are, reduced scale how sharp downsized photographs are.
    """
    image = photographs.draw(rng)
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


def vary_tone(image: FloatImage, rng: np.random.Generator) -> FloatImage:
    """Another photograph of the same shapes: colours exchanged, paler or stronger, white balance, gamma and contrast.

    A few hundred photographs are soon known by heart; what all versions of one have in common is the damage.
    Gamma and gains brighten only: how dark a photograph may be and still count as clean is for `vary_clean` to say.
    """
    out = image
    if rng.random() < 0.3:
        out = out[:, :, rng.permutation(3)]
    if rng.random() < 0.5:
        grey = out.mean(axis=2, keepdims=True)
        out = grey + (out - grey) * np.float32(rng.uniform(0.3, 1.4))
    if rng.random() < 0.4:
        out = out * rng.uniform(0.95, 1.15, 3).astype(np.float32)
    if rng.random() < 0.4:
        out = np.clip(out, 0, 1) ** np.float32(np.exp(rng.uniform(-0.4, 0.05)))
    if rng.random() < 0.3:
        out = (out - np.float32(0.5)) * np.float32(rng.uniform(0.8, 1.2)) + np.float32(0.5)
    return np.clip(out, 0, 1)


FAINTEST: dict[Degradation, float] = {Degradation.RAIN: 0.01, Degradation.HAZE: 0.08, Degradation.BLUR: 0.006}
"""Damage that changes an image by less than this on average (of 1) counts neither as such nor as clean."""

SHRINKABLE = {Degradation.RAIN, Degradation.HAZE, Degradation.LOWLIGHT, Degradation.CLEAN}
"""What stays what it is when a photograph is made smaller; noise and blur fade."""


def damage(image: FloatImage, label: Degradation, rng: np.random.Generator) -> FloatImage:
    """The image under a label, in wider ranges than a restorer trains on: what cannot be restored well is still seen.

    Noise starts above the limit of `CleanLimits`, so that a gap parts it from grainy clean photographs.
    """
    match label:
        case Degradation.NOISE:
            lowest = 1.2 * CLEAN_LIMITS.noise_sigma_255
            if rng.random() < 0.5:
                return add_noise(image, rng, sigma_255=float(rng.uniform(lowest, 60)))
            return add_camera_noise(image, rng, sigma_255=float(rng.uniform(lowest, 40)))
        case Degradation.RAIN:
            return add_rain(image, rng, spread_deg=float(rng.choice([3.0, 15.0])))
        case Degradation.HAZE:
            return add_haze(image, rng, tint=float(rng.choice([0.04, 0.12])))
        case Degradation.BLUR:
            return add_motion_blur(image, rng, longest_px=60, wander=float(rng.choice([1.0, 4.0])))
        case Degradation.LOWLIGHT:
            if rng.random() < 0.55:
                return add_deep_shadow(image, rng)
            return add_lowlight(image, rng, lowest_gain=0.05)
        case Degradation.CLEAN:
            return vary_clean(image, rng)
        case Degradation.OTHER:
            return add_other(image, rng)


def draw_damaged(photographs: Photographs, label: Degradation, rng: np.random.Generator) -> FloatImage:
    """A scene under a label, drawn again where the damage is too faint to be seen (`FAINTEST`).

    Half of the scenes are first varied within what counts as clean, so that softness or grain alone says nothing.

    Raises:
        ValueError: the damage stays too faint on a thousand scenes, as on photographs that are blank.
    """
    for _ in range(1000):
        scene = vary_tone(draw_scene(photographs, rng), rng)
        if label is not Degradation.CLEAN and rng.random() < 0.5:
            scene = vary_clean(scene, rng)
        damaged = damage(scene, label, rng)
        if float(np.abs(damaged - scene).mean()) < FAINTEST.get(label, 0.0):
            continue
        if label in SHRINKABLE and rng.random() < 0.3:
            scale = rng.uniform(0.6, 1)
            damaged = resize(damaged, *(max(160, round(side * scale)) for side in damaged.shape[:2]))
        return damaged
    raise ValueError(f"{label} shows on none of the photographs; are they blank?")


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

    @classmethod
    def synthesise(
        cls, photographs: Photographs, rng: np.random.Generator, *, count: int, view: ViewSettings
    ) -> "Samples":
        """`count` new samples."""
        samples = cls.empty(count, view)
        shares = np.array([SHARES[label] for label in LABELS])
        for place, label in enumerate(rng.choice(len(LABELS), size=count, p=shares / shares.sum())):
            views = take_views(as_filed(draw_damaged(photographs, LABELS[label], rng), rng), view)
            samples.crops[place], samples.thumbnails[place] = views.crops, views.thumbnail
            samples.labels[place] = label
        samples.filled = samples.written = count
        return samples

    def add(self, others: "Samples") -> None:
        """Takes in other samples, in the place of the oldest once there is no room."""
        places = (self.written + np.arange(others.filled)) % len(self.labels)
        self.crops[places], self.thumbnails[places] = others.crops, others.thumbnails
        self.labels[places] = others.labels
        self.written += others.filled
        self.filled = min(self.written, len(self.labels))

    def batch(self, chosen: NDArray[np.integer]) -> tuple[Tensor, Tensor, Tensor]:
        """Crops, thumbnails (network inputs) and labels of the chosen samples."""
        crops, thumbnails = torch.from_numpy(self.crops[chosen]), torch.from_numpy(self.thumbnails[chosen])
        return to_input(crops), to_input(thumbnails), torch.from_numpy(self.labels[chosen])
