"""Training samples of the restorer: patches of photographs, degraded by synthesis or taken from pairs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from classifier.labels import LABELS, Degradation
from classifier.sigma import estimate_sigma
from jobs.errors import UsageError
from jobs.training_config import Data, Phase, RestorerTraining
from jobs.training_data import Photographs, inventory
from pipeline.degradations import CameraNoise, MotionBlur, Noise, Recipe, apply
from pipeline.prompting import noise_prompt
from pipeline.synthesis import add_jpeg, damaged, draw_recipe, from_uint8, to_uint8, well_exposed

BLUR_PATHS_KEY = 99
"""Beside a path's number, for the draw of one of `Phase.blur_paths`."""

LABELS_KEY = 2**32 - 1
"""Beside seed and step, for the draw of a step's labels; its samples have their places in the batch instead."""


@dataclass(frozen=True)
class Sample:
    """One training pair, H x W x 3 uint8, its prompt, and where it is from."""

    degraded: NDArray[np.uint8] | Recipe
    """Or what makes it of the clean one."""
    clean: NDArray[np.uint8]
    prompt: str
    name: str


@dataclass(frozen=True)
class Sources:
    """The photographs of a configuration: clean ones, and the pairs of each label that has some."""

    data: Data
    clean: Photographs | None
    pairs: Mapping[Degradation, Photographs]

    @classmethod
    def load(cls, data: Data, *, largest_patch_px: int = 0) -> "Sources":
        """Reads everything; raises UsageError as `Photographs` does."""
        options: dict[str, Any] = {"least_readable": data.least_readable, "on_disk": data.on_disk}
        of_pairs = options | {"largest_patch_px": largest_patch_px}
        pairs = {
            each.label: Photographs.pairs(each.degraded, each.reference, match=each.match, **of_pairs)
            for each in data.pairs
        }
        return cls(data, Photographs.clean(data.clean, **options) if data.clean else None, pairs)

    def part(self, *, validation: bool) -> "Sources":
        """What is held out for validation, or the rest; raises UsageError if some folder has nothing of it."""
        pairs = {
            each.label: self.pairs[each.label].part(validation=validation, match=each.match) for each in self.data.pairs
        }
        return Sources(self.data, self.clean.part(validation=validation) if self.clean is not None else None, pairs)

    @property
    def inventory(self) -> str:
        """Of all scenes, see `jobs.training_data.inventory`."""
        return inventory(([] if self.clean is None else [self.clean]) + list(self.pairs.values()))

    def draw(
        self,
        rng: np.random.Generator,
        *,
        label: Degradation,
        side_px: int,
        jpeg_share: float,
        blur_paths: int = 0,
        as_recipe: bool = False,
    ) -> Sample:
        """A degraded patch, rounded to eight bits as a file would hold it, with its clean original.

        Low light is made of a photograph as a longer exposure shows it (`well_exposed`). Noise gets the prompt for its
        sigma as an estimator would see it: with a tenth of error. With `as_recipe` what is synthesised comes as its
        recipe, but for sensor noise and JPEG, whose tools want the pixels here.
        """
        pairs = self.pairs.get(label)
        if pairs is not None and (self.clean is None or rng.random() < self.data.pair_share):
            name, (degraded, clean) = pairs.patches(rng, side_px=side_px, smallest_scale=1.0)
            return Sample(degraded, clean, _prompt_seen(label, degraded, rng), name)
        if self.clean is None:
            raise UsageError(f"there are neither clean photographs nor pairs for {label}")
        scale = self.data.smallest_scale.get(label, 0.5)
        name, (clean,) = self.clean.patches(rng, side_px=side_px, smallest_scale=scale)
        if label is Degradation.LOWLIGHT:
            clean = to_uint8(well_exposed(from_uint8(clean)))
        recipe, prompt = self._draw_recipe(label, rng, side_px, blur_paths)
        quality = int(rng.integers(70, 96)) if rng.random() < jpeg_share else None
        if as_recipe and quality is None and not isinstance(recipe, CameraNoise):
            return Sample(recipe, clean, prompt, name)
        image = damaged(from_uint8(clean), recipe)
        if isinstance(recipe, CameraNoise):
            prompt = _prompt_seen(label, to_uint8(image), rng)
        if quality is not None:
            image = add_jpeg(image, quality=quality)
        return Sample(to_uint8(image), clean, prompt, name)

    def _draw_recipe(
        self, label: Degradation, rng: np.random.Generator, side_px: int, blur_paths: int
    ) -> tuple[Recipe, str]:
        """Damage for a patch of a clean photograph, and its prompt."""
        if label is Degradation.BLUR and blur_paths:
            of_path = np.random.default_rng([BLUR_PATHS_KEY, int(rng.integers(blur_paths))])
            blur = draw_recipe(label, of_path, side_px, side_px)
            assert isinstance(blur, MotionBlur)
            return replace(blur, seed=int(rng.integers(2**63))), str(label)
        if label is Degradation.NOISE and self.data.noise_sigmas_255:
            sigma_255 = float(rng.choice(self.data.noise_sigmas_255))
            return Noise.draw(rng, sigma_255=sigma_255), noise_prompt(sigma_255)
        recipe = draw_recipe(label, rng, side_px, side_px)
        return recipe, noise_prompt(recipe.sigma_255 * rng.normal(1, 0.1)) if isinstance(recipe, Noise) else str(label)

    def batch(
        self,
        config: RestorerTraining,
        phase: Phase,
        step: int,
        *,
        part: slice = slice(None),
        as_recipe: bool = False,
    ) -> list[Sample]:
        """The samples of a step, or a part of them: the same whenever and wherever they are drawn."""
        tasks = sorted(phase.tasks, key=LABELS.index)  # in whatever order a configuration names them
        shares = np.array([phase.tasks[label] for label in tasks])
        labels = np.random.default_rng([config.seed, step, LABELS_KEY]).choice(
            tasks, size=phase.batch, p=shares / shares.sum()
        )
        return [
            self.draw(
                np.random.default_rng([config.seed, step, place]),
                label=Degradation(labels[place]),
                side_px=phase.patch_px,
                jpeg_share=config.jpeg_share,
                blur_paths=phase.blur_paths,
                as_recipe=as_recipe,
            )
            for place in range(phase.batch)[part]
        ]


def _prompt_seen(label: Degradation, degraded: NDArray[np.uint8], rng: np.random.Generator) -> str:
    """The prompt for a degraded image whose noise is as strong as an estimator makes of it, with a tenth of error."""
    return noise_prompt(estimate_sigma(degraded) * rng.normal(1, 0.1)) if label is Degradation.NOISE else str(label)


@dataclass(frozen=True)
class Batch:
    """Samples stacked, with their prompts and names; pixels are uint8, H x W x 3 each."""

    clean: Tensor
    """Of all B samples."""
    degraded: Tensor
    """Of those without a recipe, in their order."""
    recipes: Mapping[int, Recipe]
    """By place in the batch: what `to` makes the degraded images with."""
    prompts: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Batch":
        """Stacks samples of one size."""
        clean = np.stack([sample.clean for sample in samples])
        made = [sample.degraded for sample in samples if not isinstance(sample.degraded, Recipe)]
        return cls(
            clean=torch.from_numpy(clean),
            degraded=torch.from_numpy(np.stack(made) if made else clean[:0]),
            recipes={place: s.degraded for place, s in enumerate(samples) if isinstance(s.degraded, Recipe)},
            prompts=tuple(sample.prompt for sample in samples),
            names=tuple(sample.name for sample in samples),
        )

    def pin_memory(self) -> "Batch":
        """In memory that a GPU reads by itself; called by torch's loader."""
        return replace(self, degraded=self.degraded.pin_memory(), clean=self.clean.pin_memory())

    @torch.no_grad()
    def to(self, device: torch.device) -> "ReadyBatch":
        """On a device, where recipes are applied to all images of a kind at once, and rounded to eight bits."""
        clean, made = (
            pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
            for pixels in (self.clean, self.degraded)
        )
        degraded = torch.empty_like(clean)
        drawn, ready = (
            torch.tensor([place for place in range(len(clean)) if (place in self.recipes) is there], dtype=torch.int64)
            for there in (True, False)
        )
        degraded[ready] = made
        if self.recipes:
            degraded[drawn] = (apply(clean[drawn].contiguous(), list(self.recipes.values())) * 255).round() / 255
        return ReadyBatch(degraded, clean, self.prompts, self.names)


@dataclass(frozen=True)
class ReadyBatch:
    """What a step learns from: B x 3 x H x W float32 in [0, 1] on the network's device, channels last in memory."""

    degraded: Tensor
    clean: Tensor
    prompts: tuple[str, ...]
    names: tuple[str, ...]


class Ahead:
    """Batches on a device; a GPU makes the next one on a stream of its own, beside the step on this one."""

    def __init__(self, batches: Iterator[Batch | UsageError], device: torch.device) -> None:
        self.batches, self.device = batches, device
        # What a step may do while the GPU has work; a CPU would only be kept from the step.
        self.meanwhile: Callable[[], None] = self.prepare if device.type == "cuda" else lambda: None
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.ready: ReadyBatch | Exception | None = None

    def prepare(self) -> None:
        """Takes the next batch to the device; a fault is kept for `take`, since the step at hand has none."""
        try:
            made = next(self.batches)
            if isinstance(made, UsageError):
                raise made
            with torch.cuda.stream(self.stream):
                self.ready = made.to(self.device)
        except Exception as fault:
            self.ready = fault

    def take(self) -> ReadyBatch:
        """The next batch, prepared or not."""
        if self.ready is None:
            self.prepare()
        taken, self.ready = self.ready, None
        if isinstance(taken, Exception):
            raise taken
        assert taken is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for pixels in (taken.degraded, taken.clean):
                pixels.record_stream(current)
        return taken


class Batches(Dataset[Batch | UsageError]):
    """The part of every step's samples that one process trains on, by (step, phase); see `Sources.draw`.

    A photograph that cannot be read any more comes as its fault: torch would bury what a loader process raises in the
    text of a traceback.
    """

    def __init__(self, sources: Sources, config: RestorerTraining, part: slice, *, as_recipe: bool = False) -> None:
        self.sources, self.config, self.part, self.as_recipe = sources, config, part, as_recipe

    def __getitem__(self, place: tuple[int, Phase]) -> Batch | UsageError:
        step, phase = place
        try:
            return Batch.of(self.sources.batch(self.config, phase, step, part=self.part, as_recipe=self.as_recipe))
        except UsageError as fault:
            return fault
