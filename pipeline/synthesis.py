"""Synthesised degradations of one photograph: clean in, degraded out, every draw from a given generator.

All images are H x W x 3 float32, RGB, in [0, 1] as displayed (sRGB), and results are clipped to [0, 1].
Nothing here reads a file or keeps state. Which strength still counts as clean stands in
`classifier.labels.CleanLimits`. What the degradations are, and how a GPU makes whole batches of them, is in
`pipeline.degradations`.
"""

import io
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from classifier.labels import CLEAN_LIMITS, Degradation
from pipeline import degradations, pixels
from pipeline.degradations import CameraNoise, DeepShadow, Haze, LowLight, MotionBlur, Noise, Rain, Recipe
from pipeline.point_spread import disk_kernel, gaussian_kernel, pseudo_depth

FloatImage = NDArray[np.float32]

EXPOSURE_CELLS = 16
"""Into so many places each side is divided to tell how bright the surroundings of a pixel are."""


def to_uint8(image: FloatImage) -> NDArray[np.uint8]:
    """Rounds [0, 1] to 0..255."""
    return cast(NDArray[np.uint8], np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))


def from_uint8(levels: NDArray[np.uint8]) -> FloatImage:
    """0..255 as [0, 1]."""
    return levels.astype(np.float32) / np.float32(255)


def _clip(image: NDArray[np.floating]) -> FloatImage:
    return cast(FloatImage, np.clip(image, 0, 1).astype(np.float32))


def _batched(image: FloatImage) -> torch.Tensor:
    """As 1 x C x H x W."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))[None]


def _single(batch: torch.Tensor) -> FloatImage:
    return np.ascontiguousarray(batch[0].permute(1, 2, 0).numpy())


def damaged(image: FloatImage, recipe: Recipe) -> FloatImage:
    """The image as its recipe has it."""
    return _single(degradations.apply(_batched(image), [recipe]))


def convolve(image: FloatImage, kernel: NDArray[np.floating]) -> FloatImage:
    """Convolves each channel with a 2-D kernel, borders mirrored; same size out."""
    return _single(pixels.convolve(_batched(image), [kernel]))


def resize(image: FloatImage, height: int, width: int) -> FloatImage:
    """Resamples with a Lanczos filter that averages when it shrinks."""
    channels = [
        np.asarray(Image.fromarray(image[:, :, c]).resize((width, height), Image.Resampling.LANCZOS))
        for c in range(image.shape[2])
    ]
    return _clip(np.stack(channels, axis=2))


def draw_noise_sigma(rng: np.random.Generator) -> float:
    """A standard deviation for training on the 0..255 scale: uniform in 5..55."""
    return rng.uniform(CLEAN_LIMITS.noise_sigma_255, 55.0)


def well_exposed(image: FloatImage) -> FloatImage:
    """The photograph with its dark parts as a longer exposure shows them: what low light is to be restored to.

    At each place the brightnesses of four exposures (as it is and 1, 2 and 3 stops longer) are averaged with the
    weights of exposure fusion, by how near to 0.5 they are (Mertens et al., "Exposure fusion", Pacific Graphics 2007);
    light is multiplied by what that asks for. Place means its surroundings, or the pixel itself where that is brighter.
    """
    light = pixels.to_linear(_batched(image))
    luminance = light.mean(dim=1, keepdim=True)
    around = F.interpolate(luminance, (EXPOSURE_CELLS, EXPOSURE_CELLS), mode="bilinear", antialias=True)
    around = F.interpolate(around, luminance.shape[2:], mode="bicubic").clamp(0, 1)
    place = torch.maximum(around, luminance).clamp_min(1e-4)
    exposures = pixels.to_srgb(place * 2 ** torch.arange(4.0)[:, None, None, None])
    weights = torch.exp(-((exposures - 0.5) ** 2) / (2 * 0.2**2))
    wanted = (weights * exposures).sum(dim=0) / weights.sum(dim=0)
    return _clip(_single(pixels.to_srgb(light * (pixels.to_linear(wanted) / place))))


# Damage without a prompt


def add_jpeg(image: FloatImage, *, quality: int) -> FloatImage:
    """JPEG at the given libjpeg quality, 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "JPEG", quality=quality)
    return from_uint8(np.asarray(Image.open(buffer).convert("RGB")))


def add_other(image: FloatImage, rng: np.random.Generator) -> FloatImage:
    """JPEG of quality 5..25, defocus of radius 3..8 px, or enlargement from 1/4 to 1/2 of the sides."""
    kind = rng.integers(3)
    if kind == 0:
        return add_jpeg(image, quality=int(rng.integers(5, 26)))
    if kind == 1:
        return _clip(convolve(image, disk_kernel(rng.uniform(3, 8))))
    height, width = image.shape[:2]
    factor = rng.uniform(0.25, 0.5)
    small = resize(image, max(1, round(height * factor)), max(1, round(width * factor)))
    return resize(small, height, width)


# Clean photographs as they come


def vary_clean(image: FloatImage, rng: np.random.Generator) -> FloatImage:
    """Harmless differences between undamaged photographs, all on the clean side of `CleanLimits`.

    Softness of camera originals (Gaussian below 0.7 px, or enlargement by at most a third) or sharpening as cameras and
    scanners do it, exposure and contrast as a photographer may choose them, the pale blacks of film and prints, a
    distance that fades a little, grain below sigma 3.
    """
    height, width = image.shape[:2]
    out = image
    kind = rng.random()
    if kind < 0.25:
        out = _clip(convolve(out, gaussian_kernel(rng.uniform(0.3, 0.7 * CLEAN_LIMITS.blur_px))))
    elif kind < 0.4:
        factor = rng.uniform(CLEAN_LIMITS.scale, 1)
        out = resize(resize(out, round(height * factor), round(width * factor)), height, width)
    elif kind < 0.6:
        soft = convolve(out, gaussian_kernel(rng.uniform(0.5, 1.2)))
        out = _clip(out + np.float32(rng.uniform(0.2, 1.2)) * (out - soft))
    if rng.random() < 0.3:
        out = out ** np.float32(rng.uniform(0.75, 1.15))
    if rng.random() < 0.3:
        out = out * np.float32(rng.uniform(0.88, 1.0))
    if rng.random() < 0.15:
        out = _clip(out)
        steeper = out * out * (3 - 2 * out) - out
        darkest = float(CLEAN_LIMITS.exposure * image.mean() - out.mean())
        most = 1.0 if steeper.mean() >= 0 else min(1.0, max(0.0, darkest / float(steeper.mean())))
        out = out + np.float32(rng.uniform(0, most)) * steeper
    kind = rng.random()
    if kind < 0.25:
        black = rng.uniform(0, 0.14) * rng.uniform(0.4, 1, 3)
        black = black * min(1.0, (1 - CLEAN_LIMITS.transmission) / black.mean())
        out = black.astype(np.float32) + (1 - black.astype(np.float32)) * out
    elif kind < 0.4:
        depth = _single(pixels.follow_edges(_batched(pseudo_depth(height, width, rng)[:, :, None]), _batched(image)))
        faded = depth * np.float32(rng.uniform(0, 1 - CLEAN_LIMITS.transmission) / depth.mean())
        out = out + faded * (np.float32(rng.uniform(0.65, 1)) - out)
    if rng.random() < 0.4:
        grain = Noise if rng.random() < 0.5 else CameraNoise
        sigma_255 = rng.uniform(0, 0.6 * CLEAN_LIMITS.noise_sigma_255)
        out = damaged(_clip(out), grain.draw(rng, sigma_255=sigma_255))
    return _clip(out)


def draw_recipe(label: Degradation, rng: np.random.Generator, height: int, width: int) -> Recipe:
    """Damage under a label that has a prompt, as a restorer trains on it, for an image of this size.

    A quarter of the noise is a camera's, half of the blur a trembling hand's, and two fifths of low light are deep
    shadows.
    """
    match label:
        case Degradation.NOISE:
            sigma_255 = draw_noise_sigma(rng)
            return (CameraNoise if rng.random() < 0.25 else Noise).draw(rng, sigma_255=sigma_255)
        case Degradation.RAIN:
            return Rain.draw(rng, height, width)
        case Degradation.HAZE:
            return Haze.draw(rng, height, width)
        case Degradation.BLUR:
            if rng.random() < 0.5:
                return MotionBlur.draw(rng, tremor=True)
            return MotionBlur.draw(rng, wander=float(rng.choice([1.0, 4.0])))
        case Degradation.LOWLIGHT:
            return (DeepShadow if rng.random() < 0.4 else LowLight).draw(rng)
        case _:
            raise ValueError(f"{label} has no prompt")
