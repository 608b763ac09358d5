"""Training samples of the classifier: photographs degraded whole, seen through crops and thumbnail as in use."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from classifier.labels import CLEAN_LIMITS, LABELS, Degradation
from classifier.network import to_input
from classifier.view import ViewSettings, take_views
from jobs.errors import TrainingError
from jobs.training_data import Photographs
from pipeline.degradations import (
    FAINTEST_STREAKS,
    CameraNoise,
    DeepShadow,
    Haze,
    LowLight,
    MotionBlur,
    Noise,
    Rain,
    Recipe,
    log_uniform,
)
from pipeline.synthesis import FloatImage, add_other, damaged, from_uint8, resize, to_uint8, vary_clean

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


def draw_scene(
    photographs: Photographs, rng: np.random.Generator, *, whole: bool = False, native: bool = False
) -> FloatImage:
    """A photograph or a part of one, H x W x 3 in [0, 1], sides from 160 px, at native or reduced scale.

    Its shorter side has at most 512 px, its longer one seldom more than 640. None is enlarged, which would be damage.

    Native scale shows how soft camera originals are, reduced scale how sharp downsized photographs are. A `whole`
    one is reduced, and cut only where it is more than twice as wide as high; a `native` one is cut, and never reduced.
    """
    image = photographs.draw(rng)
    height, width = image.shape[:2]
    kind = rng.random()
    if whole or (kind < 0.35 and not native):
        scale = min(1.0, log_uniform(rng, 224, 480) / min(height, width))
        source_height, source_width = height, min(width, 2 * height)
    else:
        scale = 1.0 if native or kind > 0.75 else log_uniform(rng, 0.35, 1)
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
    return from_uint8(part)


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


def draw_dark_scene(photographs: Photographs, rng: np.random.Generator) -> FloatImage:
    """The darkest of four scenes: dark subjects, night and shade, exposed as their photographer wanted them."""
    return min((draw_scene(photographs, rng) for _ in range(4)), key=lambda scene: float(scene.mean()))


FAINTEST: dict[Degradation, float] = {
    Degradation.RAIN: FAINTEST_STREAKS,
    Degradation.HAZE: 0.08,
    Degradation.BLUR: 0.006,
}
"""Damage that changes an image by less than this on average (of 1) counts neither as such nor as clean."""

SHRINKABLE = {Degradation.RAIN, Degradation.HAZE, Degradation.LOWLIGHT, Degradation.CLEAN}
"""What stays what it is when a photograph is made smaller; noise and blur fade."""


def draw_wide_recipe(label: Degradation, rng: np.random.Generator, height: int, width: int) -> Recipe:
    """As `draw_recipe`, in wider ranges than a restorer trains on: what cannot be restored well is still seen.

    Noise starts above the limit of `CleanLimits`, so that a gap parts it from grainy clean photographs; a camera's
    coarse grain, which is seen the sooner, at four fifths of it.
    """
    match label:
        case Degradation.NOISE:
            limit = CLEAN_LIMITS.noise_sigma_255
            kind = rng.random()
            if kind < 0.4:
                return Noise.draw(rng, sigma_255=rng.uniform(1.2 * limit, 60))
            if kind < 0.7:
                return CameraNoise.draw(rng, sigma_255=rng.uniform(1.2 * limit, 40), coarsest_px=1.3)
            sigma_255 = log_uniform(rng, 0.8 * limit, 25)
            return CameraNoise.draw(rng, sigma_255=sigma_255, grain_px=rng.uniform(1, 2.2))
        case Degradation.RAIN:
            return Rain.draw(rng, height, width, spread_deg=float(rng.choice([3.0, 15.0])), downpours=True)
        case Degradation.HAZE:
            return Haze.draw(rng, height, width, tint=float(rng.choice([0.04, 0.12])))
        case Degradation.BLUR:
            return MotionBlur.draw(
                rng, longest_px=min(60, max(height, width) / 2.5), wander=float(rng.choice([1.0, 4.0]))
            )
        case Degradation.LOWLIGHT:
            return DeepShadow.draw(rng) if rng.random() < 0.55 else LowLight.draw(rng, lowest_gain=0.05)
        case _:
            raise ValueError(f"{label} has no prompt")


def damage(image: FloatImage, label: Degradation, rng: np.random.Generator) -> FloatImage:
    """The image under a label."""
    match label:
        case Degradation.CLEAN:
            return vary_clean(image, rng)
        case Degradation.OTHER:
            return add_other(image, rng)
        case _:
            return damaged(image, draw_wide_recipe(label, rng, *image.shape[:2]))


def draw_training_scene(photographs: Photographs, label: Degradation, rng: np.random.Generator) -> FloatImage:
    """A scene to learn a label on: six of ten have another tone, and dark ones are more than among photographs.

    A quarter of those that no lack of light is to damage are dark, so that darkness alone says nothing.
    """
    dark = label is not Degradation.LOWLIGHT and rng.random() < 0.25
    scene = (draw_dark_scene if dark else draw_scene)(photographs, rng)
    return vary_tone(scene, rng) if rng.random() < 0.6 else scene


def made_small(scene: FloatImage, rng: np.random.Generator, *, below_px: int) -> FloatImage:
    """The scene with a shorter side of 24 px to less than `below_px`, as thumbnails and cut-outs have it."""
    height, width = scene.shape[:2]
    scale = log_uniform(rng, 24, below_px - 1) / min(height, width)
    return resize(scene, round(scale * height), round(scale * width))


def draw_damaged(
    photographs: Photographs,
    label: Degradation,
    rng: np.random.Generator,
    *,
    training: bool = False,
    below_px: int | None = None,
) -> FloatImage:
    """A scene under a label, drawn again where the damage is too faint to be seen (`FAINTEST`).

    Half of those to be damaged are first varied within what counts as clean, so that softness or grain alone says
    nothing. For a `training` the scene is one of `draw_training_scene`, else as its photographer took it: calibration
    has to see what is met in use, as often as it is met. With `below_px` it is `made_small` before it is damaged.

    Raises:
        ValueError: the damage stays too faint on a thousand scenes, as on photographs that are blank.
    """
    for _ in range(1000):
        scene = draw_training_scene(photographs, label, rng) if training else draw_scene(photographs, rng)
        if below_px is not None:
            scene = made_small(scene, rng, below_px=below_px)
        if label is not Degradation.CLEAN and rng.random() < 0.5:
            scene = vary_clean(scene, rng)
        seen = damage(scene, label, rng)
        if float(np.abs(seen - scene).mean()) < FAINTEST.get(label, 0.0):
            continue
        if label in SHRINKABLE and below_px is None and rng.random() < 0.3:
            scale = rng.uniform(0.6, 1)
            seen = resize(seen, *(max(160, round(side * scale)) for side in seen.shape[:2]))
        return seen
    raise ValueError(f"{label} shows on none of the photographs; are they blank?")


LABELLED_WEIGHT = 40
"""As many images of a label weigh as much as its synthesis: of five, each is drawn in one of 45 cases."""


def draw_labelled(
    labelled: Photographs, label: Degradation, rng: np.random.Generator, *, training: bool = False
) -> FloatImage:
    """An image that carries its label already, varied as `draw_damaged` varies scenes before it damages them.

    Unless it is clean it is seen whole, since a part of it may be undamaged. What fades when it is made smaller, or
    softer (it is not `SHRINKABLE`), is seen in parts at its own scale instead, and varied in tone alone.
    """
    is_clean, fades = label is Degradation.CLEAN, label not in SHRINKABLE
    image = draw_scene(labelled, rng, whole=not (is_clean or fades), native=fades)
    if training and rng.random() < 0.6:
        image = vary_tone(image, rng)
    return vary_clean(image, rng) if is_clean or (not fades and rng.random() < 0.5) else image


def as_filed(image: FloatImage, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The image in eight bits, in two of five cases after JPEG of a quality that still counts as clean."""
    pixels = to_uint8(image)
    if rng.random() < 0.6:
        return pixels
    buffer = io.BytesIO()
    quality = int(rng.integers(CLEAN_LIMITS.jpeg_quality + 12, 97))
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=int(rng.choice([0, 2])))
    return np.asarray(Image.open(buffer).convert("RGB"))


Samples = NDArray[np.void]
"""Views of many images, records of `sample_type`."""


def sample_type(view: ViewSettings) -> np.dtype[np.void]:
    """A sample's number from 1 up, its label's place in `LABELS`, and the views, uint8 RGB."""
    crops, thumbnail = (view.crops, view.crop_px, view.crop_px, 3), (view.thumbnail_px, view.thumbnail_px, 3)
    fields = [("number", np.int64), ("label", np.int64), ("crops", np.uint8, crops), ("thumbnail", np.uint8, thumbnail)]
    return np.dtype(fields)


class Synthesis(Dataset[Samples]):
    """Samples by their numbers: each is the same whenever and wherever it is made.

    Those for `training` and those for validation have their scenes as `draw_damaged` says. Of what is `labelled` as
    clean each image is drawn as often as a photograph, of other labels as `LABELLED_WEIGHT` says. With `small` all are
    small enough for `Views.small`, and synthesised.
    """

    def __init__(
        self,
        photographs: Photographs,
        labelled: Mapping[Degradation, Photographs] = MappingProxyType({}),
        *,
        seed: int,
        view: ViewSettings,
        training: bool,
        small: bool = False,
    ) -> None:
        self.photographs, self.labelled = photographs, labelled
        self.seed, self.view, self.training = seed, view, training
        self.below_px = view.crop_px if small else None

    def _image(self, label: Degradation, rng: np.random.Generator) -> FloatImage:
        if (labelled := self.labelled.get(label)) is not None:
            count = len(labelled.names)
            others = len(self.photographs.names) if label is Degradation.CLEAN else LABELLED_WEIGHT
            if rng.random() < count / (count + others):
                return draw_labelled(labelled, label, rng, training=self.training)
        return draw_damaged(self.photographs, label, rng, training=self.training, below_px=self.below_px)

    def __getitem__(self, numbers: Sequence[int]) -> Samples:
        samples = np.zeros(len(numbers), sample_type(self.view))
        shares = np.array([SHARES[label] for label in LABELS])
        for sample, number in zip(samples, numbers, strict=True):
            rng = np.random.default_rng([self.seed, number])
            label = int(rng.choice(len(LABELS), p=shares / shares.sum()))
            views = take_views(as_filed(self._image(LABELS[label], rng), rng), self.view)
            sample["number"], sample["label"] = number, label
            sample["crops"], sample["thumbnail"] = views.crops, views.thumbnail
        return samples


def as_batch(samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    """Crops, thumbnails (network inputs) and labels."""
    crops, thumbnails = (torch.from_numpy(np.ascontiguousarray(samples[name])) for name in ("crops", "thumbnail"))
    return to_input(crops), to_input(thumbnails), torch.from_numpy(samples["label"].copy())


class Pool:
    """The newest samples, each in its number's place in a file, where a training that goes on finds them again."""

    def __init__(self, path: Path, size: int, view: ViewSettings) -> None:
        """Opens the file, or makes one.

        Raises:
            TrainingError: the disk has no room for it, or cannot reserve it.
        """
        kind = sample_type(view)
        room = size * kind.itemsize
        if not path.exists() or path.stat().st_size != room:
            try:
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, room)  # a mapped file that cannot grow ends the process
            except OSError as error:
                path.unlink(missing_ok=True)
                raise TrainingError(f"{path}: {room / 1e9:.1f} GB for samples cannot be had: {error}") from error
        self.samples: Samples = np.memmap(path, kind, "r+", shape=(size,))

    def missing(self, newest: int) -> list[int]:
        """Numbers that belong into a pool whose newest sample this is, and are not there."""
        wanted = np.arange(max(1, newest - len(self.samples) + 1), newest + 1)
        there = self.samples["number"][wanted % len(self.samples)]
        return [int(number) for number in wanted[there != wanted]]

    def add(self, samples: Samples) -> None:
        """Takes in samples, each in the place of one `size` numbers older."""
        for sample in samples:
            place = self.samples[sample["number"] % len(self.samples)]
            place["number"] = 0  # until all of it is there
            for name in ("label", "crops", "thumbnail", "number"):
                place[name] = sample[name]

    def draw(self, rng: np.random.Generator, *, newest: int, count: int) -> Samples:
        """Samples by chance, of the pool whose newest is given."""
        numbers = newest - rng.integers(min(newest, len(self.samples)), size=count)
        return self.samples[numbers % len(self.samples)]
