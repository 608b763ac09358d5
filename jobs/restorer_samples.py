"""Training samples of the restorer: patches of photographs, degraded by synthesis or taken from pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier.labels import Degradation
from classifier.sigma import estimate_sigma
from jobs.errors import UsageError
from jobs.training_config import Data, Phase, RestorerTraining
from jobs.training_data import Photographs
from pipeline.prompting import noise_prompt
from pipeline.synthesis import FloatImage, add_jpeg, add_noise, degrade, to_uint8


@dataclass(frozen=True)
class Sample:
    """One training pair, H x W x 3 float32 in [0, 1], its prompt, and where it is from."""

    degraded: FloatImage
    clean: FloatImage
    prompt: str
    name: str


@dataclass(frozen=True)
class Sources:
    """The photographs of a configuration: clean ones, and the pairs of each label that has some."""

    data: Data
    clean: Photographs | None
    pairs: Mapping[Degradation, Photographs]

    @classmethod
    def load(cls, data: Data, *, validation: bool) -> "Sources":
        """Reads the training or the validation part; raises UsageError as `Photographs` does."""
        options: dict[str, Any] = {
            "validation": validation, "least_readable": data.least_readable, "on_disk": data.on_disk,
        }  # fmt: skip
        pairs = {
            each.label: Photographs.pairs(each.degraded, each.reference, match=each.match, **options)
            for each in data.pairs
        }
        return cls(data, Photographs.clean(data.clean, **options) if data.clean else None, pairs)

    def draw(self, rng: np.random.Generator, *, label: Degradation, side_px: int, jpeg_share: float) -> Sample:
        """A degraded patch, rounded to eight bits as a file would hold it, with its clean original.

        Noise gets the prompt for its sigma as an estimator would see it: with a tenth of error.
        """
        pairs = self.pairs.get(label)
        sigma_255: float | None
        prompt = str(label)
        if pairs is not None and (self.clean is None or rng.random() < self.data.pair_share):
            name, (degraded, clean) = pairs.patches(rng, side_px=side_px, smallest_scale=1.0)
            sigma_255 = estimate_sigma(to_uint8(degraded)) if label is Degradation.NOISE else None
        elif self.clean is not None:
            scale = self.data.smallest_scale.get(label, 0.5)
            name, (clean,) = self.clean.patches(rng, side_px=side_px, smallest_scale=scale)
            if label is Degradation.NOISE and self.data.noise_sigmas_255:
                exact = float(rng.choice(self.data.noise_sigmas_255))
                degraded, sigma_255, prompt = add_noise(clean, rng, sigma_255=exact), None, noise_prompt(exact)
            else:
                degraded, sigma_255 = degrade(clean, label, rng)
            if rng.random() < jpeg_share:
                degraded = add_jpeg(degraded, quality=int(rng.integers(70, 96)))
        else:
            raise UsageError(f"there are neither clean photographs nor pairs for {label}")
        if sigma_255 is not None:
            prompt = noise_prompt(sigma_255 * rng.normal(1, 0.1))
        return Sample(to_uint8(degraded).astype(np.float32) / np.float32(255), clean, prompt, name)

    def batch(self, config: RestorerTraining, phase: Phase, step: int, *, part: slice = slice(None)) -> list[Sample]:
        """The samples of a step, or a part of them: the same whenever and wherever they are drawn."""
        shares = np.array(list(phase.tasks.values()))
        labels = np.random.default_rng([config.seed, step]).choice(
            list(phase.tasks), size=phase.batch, p=shares / shares.sum()
        )
        return [
            self.draw(
                np.random.default_rng([config.seed, step, place]),
                label=Degradation(labels[place]),
                side_px=phase.patch_px,
                jpeg_share=config.jpeg_share,
            )
            for place in range(phase.batch)[part]
        ]


def to_batch(images: Sequence[FloatImage], device: torch.device) -> Tensor:
    """Stacks H x W x 3 images into B x 3 x H x W, channels last in memory."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)
