"""Clean photographs in memory, cut into training patches."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.synthesis import FloatImage, resize

log = logging.getLogger(__name__)

VALIDATION_PERCENT = 8
"""Share of the photographs held out for calibration and model choice."""


def is_validation(name: str) -> bool:
    """Whether a photograph belongs to the fixed validation split, by a hash of its file name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < VALIDATION_PERCENT


@dataclass(frozen=True)
class CleanPhotographs:
    """Photographs as H x W x 3 uint8 arrays, with their file names."""

    names: tuple[str, ...]
    images: tuple[NDArray[np.uint8], ...]

    @classmethod
    def load(cls, folder: Path, *, validation: bool, min_side_px: int = 160) -> "CleanPhotographs":
        """Reads the training or the validation part of a folder.

        Unreadable files are named in the log and skipped; raises ValueError if nothing is left.
        """
        names, images = [], []
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in {".jpg", ".jpeg", ".png"} or is_validation(path.name) != validation:
                continue
            try:
                image = np.asarray(Image.open(path).convert("RGB"))
            except OSError as error:
                log.warning("skipped %s: %s", path, error)
                continue
            if min(image.shape[:2]) >= min_side_px:
                names.append(path.name)
                images.append(image)
        if not images:
            raise ValueError(f"no usable photograph in {folder}")
        return cls(tuple(names), tuple(images))

    def patch(self, rng: np.random.Generator, *, side_px: int, smallest_scale: float) -> FloatImage:
        """A random square patch, side_px x side_px x 3 in [0, 1], flipped and turned at random.

        It is cut at a scale between `smallest_scale` and 1, log-uniform, and shrunk to size.
        """
        image = self.images[rng.integers(len(self.images))]
        scale = np.exp(rng.uniform(np.log(smallest_scale), 0))
        if rng.random() < 0.3:
            scale = 1.0
        source_px = min(round(side_px / scale), *image.shape[:2])
        top = rng.integers(image.shape[0] - source_px + 1)
        left = rng.integers(image.shape[1] - source_px + 1)
        crop = image[top : top + source_px, left : left + source_px].astype(np.float32) / np.float32(255)
        if source_px != side_px:
            crop = resize(crop, side_px, side_px)
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.3:
            crop = np.rot90(crop, int(rng.integers(1, 4)))
        return np.ascontiguousarray(crop)
