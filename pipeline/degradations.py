"""The degradations that have a prompt: drawn for one image at a time, applied to whole batches on any device.

A recipe holds what was drawn for one image: numbers, small kernels, maps, and the seed of its random pixels, so that
processes without a GPU can draw it and a GPU can apply it. `apply` gives an image the same damage whatever is beside it
in the batch, up to rounding. Images are B x 3 x H x W float32, RGB, in [0, 1] as displayed (sRGB), and so are results.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier.labels import CLEAN_LIMITS
from pipeline.pixels import (
    RandomPixels,
    column,
    convolve,
    follow_edges,
    maps,
    mean,
    quantiles,
    sky,
    to_linear,
    to_srgb,
)
from pipeline.point_spread import (
    Field,
    Kernel,
    gaussian_kernel,
    line_kernel,
    pseudo_depth,
    smooth_field,
    spread_px,
    trajectory_kernel,
    tremor_kernel,
)


def _draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between both, its logarithm uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


# Recipes


class Recipe(ABC):
    """What was drawn for the damage of one image."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for recipes that are applied together."""
        return (type(self),)

    @staticmethod
    @abstractmethod
    def applied(images: Tensor, recipes: Sequence[Any]) -> Tensor:
        """Images, each damaged by its recipe; these are of this class and of one kind."""


def apply(images: Tensor, recipes: Sequence[Recipe]) -> Tensor:
    """Images, B x 3 x H x W in [0, 1], each damaged by its recipe; those of a kind go together."""
    out = torch.empty_like(images)
    for kind in dict.fromkeys(recipe.kind for recipe in recipes):
        places = [place for place, recipe in enumerate(recipes) if recipe.kind == kind]
        index = torch.tensor(places, device=images.device)
        out[index] = recipes[places[0]].applied(images[index], [recipes[place] for place in places])
    return out


def _noisy(images: Tensor, recipes: Sequence[Any]) -> Tensor:
    """Images with white noise, of the `seed` and `sigma_255` of their recipes."""
    noise = RandomPixels([r.seed for r in recipes], images).normal()
    return (images + noise * column([r.sigma_255 for r in recipes], images) / 255).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Noise(Recipe):
    """White Gaussian noise of standard deviation `sigma_255` on the 0..255 scale."""

    seed: int
    sigma_255: float

    @classmethod
    def draw(cls, rng: np.random.Generator, *, sigma_255: float) -> "Noise":
        """Of the given strength."""
        return cls(_draw_seed(rng), sigma_255)

    @staticmethod
    def applied(images: Tensor, recipes: Sequence["Noise"]) -> Tensor:
        """See `Recipe`."""
        return _noisy(images, recipes)


@dataclass(frozen=True, eq=False)
class CameraNoise(Recipe):
    """Noise of a sensor, seen through what a camera does to it, with a mean of `sigma_255` on the 0..255 scale.

    In linear light a part whose variance grows with the signal and a constant one (Foi et al., "Practical
    Poissonian-Gaussian noise modeling", 2008); then, as demosaicking and noise reduction leave it, smoothed by a
    Gaussian of 0.3 to `coarsest_px`, and stronger by 1 to 2.5 in colour than in brightness in half of the cases.
    """

    seed: int
    sigma_255: float
    constant: float
    grain: Kernel
    colour: float

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        *,
        sigma_255: float,
        coarsest_px: float = 0.8,
        grain_px: float | None = None,
    ) -> "CameraNoise":
        """Of the given strength, and smoothed by the given `grain_px` if there is one."""
        if grain_px is None and rng.random() < 0.7:
            grain_px = rng.uniform(0.3, coarsest_px)
        grain = gaussian_kernel(grain_px) if grain_px is not None else np.ones((1, 1), np.float32)
        colour = rng.uniform(1, 2.5) if rng.random() < 0.5 else 1.0
        return cls(_draw_seed(rng), sigma_255, rng.uniform(0.02, 0.3), grain, colour)

    @staticmethod
    def applied(images: Tensor, recipes: Sequence["CameraNoise"]) -> Tensor:
        """See `Recipe`."""
        constant = column([r.constant for r in recipes], images)
        noise = RandomPixels([r.seed for r in recipes], images).normal() * (to_linear(images) + constant**2).sqrt()
        noise = convolve(noise, [r.grain for r in recipes])
        brightness = noise.mean(dim=1, keepdim=True)
        noise = brightness + column([r.colour for r in recipes], images) * (noise - brightness)
        # The slope of the display curve turns noise in light into noise on the 0..255 scale.
        seen = noise / (2.4 / 1.055 * ((images + 0.055) / 1.055) ** 1.4).clamp_min(1 / 12.92)
        strength = seen.std(dim=(1, 2, 3), correction=0, keepdim=True).clamp_min(1e-6)
        return (images + seen * column([r.sigma_255 for r in recipes], images) / 255 / strength).clamp(0, 1)


FAINTEST_STREAKS = 0.01
"""Of 1, on average over the image."""


@dataclass(frozen=True, eq=False)
class Streaks:
    """One layer of rain."""

    streak: Kernel
    density: float
    """Drops per pixel."""
    opacity: float
    where: Field | float
    """The share of it that is seen, for each pixel."""
    added: bool
    """As light besides the scene's, instead of blended towards `white`."""
    white: float

    @classmethod
    def draw(cls, rng: np.random.Generator, height: int, width: int, *, angle_deg: float, downpours: bool) -> "Streaks":
        """See `Rain`."""
        length_px = log_uniform(rng, 6 if downpours else 8, 80)
        width_px = log_uniform(rng, 0.8, min(6.0, 0.2 * length_px))
        fewest, most = (4e-3, 2e-2) if downpours and rng.random() < 1 / 6 else (2e-4, 4e-3)
        in_parts = downpours and rng.random() < 1 / 3
        return cls(
            streak=line_kernel(length_px, angle_deg, width_px, taper=rng.uniform(0, 1)),
            density=log_uniform(rng, fewest, most) * min(1.0, 40 / (length_px * width_px)),
            opacity=rng.uniform(0.1, 0.9),
            where=smooth_field(height, width, rng, cells=int(rng.integers(2, 6))) if in_parts else 1.0,
            added=rng.random() < 0.5,
            white=rng.uniform(0.7, 1.0),
        )


@dataclass(frozen=True, eq=False)
class Rain(Recipe):
    """Rain in one to three layers of streaks that share a wind direction up to `spread_deg`, and at times a veil.

    Per layer: streak length 8..80 px, width 0.8..6 px and at most a fifth of the length, sharp or tapering ends,
    0.2 to 4 drops per 1000 pixels (fewer when they are large), brightness 0.1..0.9. Streaks are blended towards a
    near-white of their own, or in half of the layers added, as light that reaches the sensor besides the scene's.
    With `downpours` streaks may be 6 px short, one of six layers has 4 to 20 drops, and a third of the layers show in
    parts of the picture only: drops are seen where light falls on them.
    Where streaks change the image by `FAINTEST_STREAKS`, three in ten have a veil of up to a tenth, one in ten of up to
    0.4, thicker with `pseudo_depth` that follows the picture's edges: distant drops that are too small to be seen as
    streaks (Li et al., "Heavy rain image restoration", CVPR 2019).
    """

    seed: int
    layers: tuple[Streaks, ...]
    veil: Field | float
    veil_light: float

    @classmethod
    def draw(
        cls, rng: np.random.Generator, height: int, width: int, *, spread_deg: float = 3.0, downpours: bool = False
    ) -> "Rain":
        """For an image of this size."""
        wind_deg = rng.uniform(-45, 45)
        layers = tuple(
            Streaks.draw(rng, height, width, angle_deg=wind_deg + rng.normal(0, spread_deg), downpours=downpours)
            for _ in range(rng.integers(1, 4))
        )
        veil: Field | float = 0.0
        light, kind = 0.8, rng.random()
        if kind < 0.3:
            veil = rng.uniform(0.0, 0.1)
        elif kind < 0.4:
            veil = np.float32(rng.uniform(0.1, 0.4)) * (0.4 + 0.6 * pseudo_depth(height, width, rng))
            light = rng.uniform(0.5, 0.9)
        return cls(_draw_seed(rng), layers, veil, light)

    @staticmethod
    def applied(images: Tensor, recipes: Sequence["Rain"]) -> Tensor:
        """See `Recipe`."""
        pixels, out = RandomPixels([r.seed for r in recipes], images), images.clone()
        for number in range(max(len(r.layers) for r in recipes)):
            places = [place for place, r in enumerate(recipes) if number < len(r.layers)]
            index = torch.tensor(places, device=images.device)
            out[index] = _behind(out[index], [recipes[i].layers[number] for i in places], pixels.uniform(places))
        # A veil alone is haze.
        seen = mean((out.clamp(0, 1) - images).abs()) >= FAINTEST_STREAKS
        veil = follow_edges(maps([r.veil for r in recipes], images), images) * seen
        return (out * (1 - veil) + veil * column([r.veil_light for r in recipes], images)).clamp(0, 1)


def _behind(images: Tensor, layers: Sequence[Streaks], chance: Tensor) -> Tensor:
    """Images behind one layer of rain each; `chance` is uniform in [0, 1), B x 1 x H x W."""
    density = column([layer.density for layer in layers], images)
    drops = torch.where(chance < density, 0.3 + 0.7 * chance / density, 0)
    streaks = convolve(drops, [layer.streak for layer in layers]).clamp(0, 1)
    opacity = streaks * column([layer.opacity for layer in layers], images)
    opacity = opacity * maps([layer.where for layer in layers], images)
    blended = opacity * (column([layer.white for layer in layers], images) - images).clamp_min(0)
    return images + torch.where(column([layer.added for layer in layers], images) > 0, 0.6 * opacity, blended)


@dataclass(frozen=True, eq=False)
class Haze(Recipe):
    """The scattering model I = J t + A (1 - t), with t = exp(-beta d) (He et al., "Dark channel prior", 2009).

    d is `pseudo_depth` stretched to 0.2..1, or to a narrower range for scenes without much depth, in half of the cases
    1 where there is `sky`, and made to follow the picture's edges; beta is 0.4..2.4. In a quarter of the cases the
    foreground is clear: d begins at 0..0.1, and beta is 1..4. The airlight A is 0.65..1 with a tint of up to `tint` per
    channel.
    """

    depth: Field
    to_sky: bool
    beta: float
    airlight: tuple[float, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator, height: int, width: int, *, tint: float = 0.04) -> "Haze":
        """For an image of this size."""
        clear_foreground = rng.random() < 0.25
        near = np.float32(rng.uniform(0, 0.1) if clear_foreground else rng.uniform(0.2, 0.7))
        return cls(
            depth=near + (1 - near) * pseudo_depth(height, width, rng),
            to_sky=rng.random() < 0.5,
            beta=rng.uniform(1, 4) if clear_foreground else rng.uniform(0.4, 2.4),
            airlight=tuple(np.clip(rng.uniform(0.65, 1.0) + rng.uniform(-tint, tint, 3), 0, 1).tolist()),
        )

    @property
    def kind(self) -> tuple[object, ...]:
        """See `Recipe`."""
        return type(self), self.to_sky

    @staticmethod
    def applied(images: Tensor, recipes: Sequence["Haze"]) -> Tensor:
        """See `Recipe`."""
        depth = maps([r.depth for r in recipes], images)
        if recipes[0].to_sky:
            depth = torch.maximum(depth, sky(images))
        transmission = (-column([r.beta for r in recipes], images) * follow_edges(depth, images)).exp()
        airlight = column([r.airlight for r in recipes], images)
        return (images * transmission + airlight * (1 - transmission)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class MotionBlur(Recipe):
    """Blur along a random camera trajectory from 6 px long, with sensor noise of sigma 0..2 on the 0..255 scale.

    In three of ten cases light is summed instead of displayed values, with highlights up to four times brighter than
    the photograph could hold: lamps draw their path (Rim et al., "Realistic blur synthesis", ECCV 2022).
    Paths that wind so much that they spread little beyond what counts as clean (`CleanLimits.blur_px`) are drawn again.
    """

    seed: int
    path: Kernel
    highlights: float | None
    """How much brighter than white they are; None: displayed values are summed."""
    sigma_255: float

    @classmethod
    def draw(
        cls, rng: np.random.Generator, *, longest_px: float = 40.0, wander: float = 1.0, tremor: bool = False
    ) -> "MotionBlur":
        """For an image of any size; with `tremor` the path is a `tremor_kernel`, else one that turns by `wander`."""
        while True:
            length_px = log_uniform(rng, 6, longest_px)
            path = (
                tremor_kernel(rng, length_px=length_px)
                if tremor
                else trajectory_kernel(rng, length_px=length_px, wander=wander)
            )
            if spread_px(path) >= 1.4 * CLEAN_LIMITS.blur_px:
                break
        highlights = rng.uniform(0, 3) if rng.random() < 0.3 else None
        return cls(_draw_seed(rng), path, highlights, rng.uniform(0, 2))

    @property
    def kind(self) -> tuple[object, ...]:
        """See `Recipe`."""
        return type(self), self.highlights is not None

    @staticmethod
    def applied(images: Tensor, recipes: Sequence["MotionBlur"]) -> Tensor:
        """See `Recipe`."""
        paths = [r.path for r in recipes]
        if recipes[0].highlights is None:
            blurred = convolve(images, paths)
        else:
            over = ((images.amin(dim=1, keepdim=True) - 0.94) / 0.06).clamp(0, 1)
            brighter = 1 + column([r.highlights for r in recipes], images) * over
            blurred = to_srgb(convolve(to_linear(images) * brighter, paths))
        return _noisy(blurred, recipes)


@dataclass(frozen=True, eq=False)
class LowLight(Recipe):
    """Under-exposure: gamma 1.2..3, gain up to 0.9 with a result below 0.55 of the brightness, sensor noise.

    In half of the cases white balance is off too, towards warm or cold, by up to a tenth in red and blue. The noise
    has a part that grows with the root of the signal and a constant one, each with sigma up to 4 on the 0..255 scale.
    """

    seed: int
    gamma: float
    warmth: float
    gain: float
    shot_255: float
    constant_255: float

    @classmethod
    def draw(cls, rng: np.random.Generator, *, lowest_gain: float = 0.12) -> "LowLight":
        """For an image of any size."""
        return cls(
            seed=_draw_seed(rng),
            gamma=rng.uniform(1.2, 3.0),
            warmth=rng.uniform(-0.1, 0.1) if rng.random() < 0.5 else 0.0,
            gain=log_uniform(rng, lowest_gain, 0.9),
            shot_255=rng.uniform(0, 4),
            constant_255=rng.uniform(0, 4) * rng.random(),
        )

    @staticmethod
    def applied(images: Tensor, recipes: Sequence["LowLight"]) -> Tensor:
        """See `Recipe`."""
        dark = images ** column([r.gamma for r in recipes], images)
        dark = dark * column([(1 + r.warmth, 1, 1 - r.warmth) for r in recipes], images)
        brightest = 0.55 * mean(images) / mean(dark).clamp_min(1e-6)
        dark = dark * torch.minimum(column([r.gain for r in recipes], images), brightest)
        shot = column([r.shot_255 for r in recipes], images) / 255
        constant = column([r.constant_255 for r in recipes], images) / 255
        noise = RandomPixels([r.seed for r in recipes], images).normal()
        return (dark + (shot * dark.sqrt() + constant) * noise).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class DeepShadow(Recipe):
    """Under-exposure of a scene with much contrast: sky and lamps keep their level, the rest falls into the dark.

    What is locally among the brightest 3..50 % stays lit, at 0.4..1 of its level and with a soft edge; the rest gets
    gamma 1.1..2.2 and gain 0.04..0.35. In half of the cases both are gains in linear light, 2 to 6 stops down in the
    dark and at most 1.5 stops where it is lit: a shorter exposure of a scene whose lights outshine the rest. The
    result is below 0.55 of the brightness, with sensor noise of sigma 0..2 on the 0..255 scale.
    """

    seed: int
    surroundings: Kernel
    low: float
    high: float
    """Quantiles of the local brightness, between which what is lit begins."""
    linear: bool
    """Gains in linear light; both gammas are 1 then."""
    dark_gamma: float
    dark_gain: float
    lit_gamma: float
    lit_gain: float
    sigma_255: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "DeepShadow":
        """For an image of any size."""
        linear = rng.random() < 0.5
        return cls(
            seed=_draw_seed(rng),
            surroundings=gaussian_kernel(rng.uniform(2, 8)),
            low=rng.uniform(0.5, 0.85),
            high=rng.uniform(0.9, 0.99),
            linear=linear,
            dark_gamma=1.0 if linear else rng.uniform(1.1, 2.2),
            dark_gain=float(np.exp2(rng.uniform(-6, -2))) if linear else log_uniform(rng, 0.04, 0.35),
            lit_gamma=1.0 if linear else rng.uniform(0.9, 1.5),
            lit_gain=float(np.exp2(rng.uniform(-1.5, 0.3)) if linear else rng.uniform(0.4, 1)),
            sigma_255=rng.uniform(0, 2),
        )

    @property
    def kind(self) -> tuple[object, ...]:
        """See `Recipe`."""
        return type(self), self.linear

    @staticmethod
    def applied(images: Tensor, recipes: Sequence["DeepShadow"]) -> Tensor:
        """See `Recipe`."""
        local = convolve(images.mean(dim=1, keepdim=True), [r.surroundings for r in recipes])
        low = quantiles(local, column([r.low for r in recipes], images))
        high = quantiles(local, column([r.high for r in recipes], images))
        lit = ((local - low) / (high - low).clamp_min(1e-3)).clamp(0, 1)
        lit = lit * lit * (3 - 2 * lit)
        dark_gain = column([r.dark_gain for r in recipes], images)
        lit_gain = column([r.lit_gain for r in recipes], images)
        if recipes[0].linear:
            out = to_srgb(to_linear(images) * (dark_gain + (lit_gain - dark_gain) * lit))
        else:
            dark = images ** column([r.dark_gamma for r in recipes], images)
            bright = images ** column([r.lit_gamma for r in recipes], images)
            out = (1 - lit) * dark * dark_gain + lit * bright * lit_gain
        out = out * (0.55 * mean(images) / mean(out).clamp_min(1e-6)).clamp_max(1)
        return _noisy(out.clamp(0, 1), recipes)
