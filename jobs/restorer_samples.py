"""Training samples of the restorer: patches of photographs, degraded by synthesis or taken from pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from classifier.labels import Degradation
from classifier.sigma import estimate_sigma
from jobs.errors import UsageError
from jobs.training_config import Data, Phase, RestorerTraining
from jobs.training_data import Photographs
from pipeline.prompting import noise_prompt
from pipeline.synthesis import FloatImage, add_jpeg, add_noise, degrade, to_uint8

LABELS_KEY = 2**32 - 1
"""Beside seed and step, for the draw of a step's labels; its samples have their places in the batch instead."""


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
        labels = np.random.default_rng([config.seed, step, LABELS_KEY]).choice(
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


@dataclass(frozen=True)
class Batch:
    """Samples stacked: B x H x W x 3, degraded uint8 and clean float32 in [0, 1], with their prompts and names."""

    degraded: Tensor
    clean: Tensor
    prompts: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Batch":
        """Stacks samples of one size."""
        return cls(
            degraded=torch.from_numpy(np.stack([to_uint8(sample.degraded) for sample in samples])),
            clean=torch.from_numpy(np.stack([sample.clean for sample in samples])),
            prompts=tuple(sample.prompt for sample in samples),
            names=tuple(sample.name for sample in samples),
        )

    def pin_memory(self) -> "Batch":
        """In memory that a GPU reads by itself; called by torch's loader."""
        return replace(self, degraded=self.degraded.pin_memory(), clean=self.clean.pin_memory())

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Degraded and clean images, B x 3 x H x W float32 in [0, 1], channels last in memory."""
        degraded, clean = (pixels.to(device, non_blocking=True) for pixels in (self.degraded, self.clean))
        return degraded.permute(0, 3, 1, 2).float() / 255, clean.permute(0, 3, 1, 2)


class Batches(Dataset[Batch]):
    """The part of every step's samples that one process trains on, by (step, phase)."""

    def __init__(self, sources: Sources, config: RestorerTraining, part: slice) -> None:
        self.sources, self.config, self.part = sources, config, part

    def __getitem__(self, place: tuple[int, Phase]) -> Batch:
        step, phase = place
        return Batch.of(self.sources.batch(self.config, phase, step, part=self.part))
