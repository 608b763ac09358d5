"""Photographs in memory, clean ones and pairs, cut into training patches."""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from classifier.labels import Degradation
from jobs.datasets import PARTNERS, is_photograph, partnered, read_rgb
from jobs.errors import UsageError
from jobs.text import harmless
from pipeline.degradations import log_uniform
from pipeline.metadata import lies

log = logging.getLogger("training")

VALIDATION_PERCENT = 8
"""Share of the photographs held out for calibration and model choice."""

Picture = NDArray[np.uint8] | Path
"""H x W x 3 pixels, or the file that has them."""

SMALLEST_SIDE_PX = 160
"""Smaller photographs are left out."""


def _encoded(name: str) -> bytes:
    """A file's name, which need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def is_validation(name: str) -> bool:
    """Whether a photograph belongs to the fixed validation split, by a hash of its file name."""
    return int.from_bytes(hashlib.sha256(_encoded(name)).digest()[:4], "big") % 100 < VALIDATION_PERCENT


def photographs_in(folders: Sequence[Path]) -> list[Path]:
    """The photographs of some folders, those of each by name; raises UsageError if a folder is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(
                f"{folder} is not a folder; paths start at the working directory, those of data.clean and data.pairs "
                "in a configuration too"
            )
    return [path for folder in folders for path in sorted(folder.iterdir()) if is_photograph(path)]


def read_all(
    paths: Sequence[Path], *, least_readable: float, on_disk: bool = False, least_px: int = SMALLEST_SIDE_PX
) -> dict[Path, Picture]:
    """The pixels of every readable file that is large enough, or with `on_disk` its path; the log tells of the others.

    Raises UsageError if fewer than this share can be read.
    """
    found: dict[Path, Picture] = {}
    unreadable, small = [], 0
    for path in paths:
        try:
            pixels = read_rgb(path)
        except UsageError as error:
            log.warning("skipped a photograph: %s", harmless(str(error)))
            unreadable.append(path.name)
            continue
        except MemoryError as error:
            raise UsageError(
                f"the photographs do not fit into memory, from {path} on; `on_disk = true` reads them when needed"
            ) from error
        if min(pixels.shape[:2]) >= least_px:
            found[path] = path if on_disk else pixels
        else:
            small += 1
    if small:
        log.warning("left out %d of %d photographs: a side has less than %d px", small, len(paths), least_px)
    readable = len(paths) - len(unreadable)
    if unreadable and readable / len(paths) < least_readable:
        raise UsageError(
            f"only {readable} of {len(paths)} photographs can be read, less than "
            f"{least_readable:.0%}; unreadable are {', '.join(unreadable[:5])}{' and others' if unreadable[5:] else ''}"
        )
    return found


def inventory(scenes: Iterable["Photographs"]) -> str:
    """How many scenes there are, with a digest of their names in order: samples depend on both."""
    names = [_encoded(name) for each in scenes for name in each.names]
    return f"{len(names)} (names {hashlib.sha256(b'/'.join(names)).hexdigest()[:12]})"


def tell_if_changed(before: str | None, now: str) -> None:
    """Warns where a training goes on with other scenes than those of its checkpoint (None: it is none, or an old one).

    It goes on all the same: one damaged file shall not cost what has been learnt.
    """
    if before is not None and before != now:
        log.warning(
            "the photographs are not those of the checkpoint: it had %s, now there are %s. The training goes on, but "
            "will not give what an unbroken one would",
            before,
            now,
        )


def _require_some(paths: Sequence[Path], *folders: Path) -> None:
    if not paths:
        raise UsageError(f"no photograph in {', '.join(map(str, folders))}; folders in it are not searched")


def _pixels(picture: Picture) -> NDArray[np.uint8]:
    return read_rgb(picture) if isinstance(picture, Path) else picture


def _size(picture: Picture) -> tuple[int, int]:
    """Width and height of the upright picture."""
    if isinstance(picture, Path):
        with Image.open(picture) as image:
            is_turned = lies(image.getexif().get(ExifTags.Base.Orientation))
            return (image.height, image.width) if is_turned else image.size
    return picture.shape[1], picture.shape[0]


@dataclass(frozen=True)
class Photographs:
    """Photographs as versions of one scene, each a tuple of pictures of one size, with their names.

    Clean photographs have one version, pairs two: degraded and reference.
    """

    names: tuple[str, ...]
    scenes: tuple[tuple[Picture, ...], ...]

    def draw(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        """The first version of a random scene, H x W x 3."""
        return _pixels(self.scenes[rng.integers(len(self.scenes))][0])

    @classmethod
    def clean(cls, folders: Sequence[Path], *, least_readable: float = 0.9, on_disk: bool = False) -> "Photographs":
        """Reads all photographs of some folders.

        Raises UsageError if too few files can be read, or nothing is left.
        """
        paths = photographs_in(folders)
        found = read_all(paths, least_readable=least_readable, on_disk=on_disk)
        if not found:
            _require_some(paths, *folders)
            where = ", ".join(map(str, folders))
            wanted = f"can be read and has {SMALLEST_SIDE_PX} px a side"
            raise UsageError(f"no usable photograph in {where}: none of {len(paths)} {wanted}")
        return cls(tuple(path.name for path in found), tuple((picture,) for picture in found.values()))

    @classmethod
    def pairs(
        cls,
        degraded: Path,
        reference: Path,
        *,
        match: str = "name",
        least_readable: float = 0.9,
        on_disk: bool = False,
        largest_patch_px: int = 0,
    ) -> "Photographs":
        """Reads all pairs of two folders; `match` is a key of `jobs.datasets.PARTNERS`.

        Those smaller than the largest patch are left out: enlarged, their damage would be another one.
        Raises UsageError if a file has no partner of its size, if too few can be read, or if nothing is left.
        """
        paths, references = photographs_in([degraded]), photographs_in([reference])
        for folder, inside in ((degraded, paths), (reference, references)):
            _require_some(inside, folder)
        partners = partnered(paths, references, reference, match=match)
        options: dict[str, Any] = {"least_readable": least_readable, "on_disk": on_disk}
        options["least_px"] = max(SMALLEST_SIDE_PX, largest_patch_px)
        first = read_all(paths, **options)
        wanted = dict.fromkeys(partners[path] for path in first)
        second = read_all(list(wanted), **options)
        scenes = {}
        for path, picture in first.items():
            other = second.get(partners[path])
            if other is None:
                continue
            if _size(other) != _size(picture):
                raise UsageError(f"{path} is of another size than its reference {partners[path]}")
            scenes[path.name] = (picture, other)
        if not scenes:
            wanted_px = f"none has {options['least_px']} px a side and can be read"
            raise UsageError(f"no usable pair in {degraded} and {reference}: {wanted_px}")
        return cls(tuple(scenes), tuple(scenes.values()))

    def part(self, *, validation: bool, match: str = "name") -> "Photographs":
        """The scenes held out for validation, or the others; pairs that `match` gives one reference stay together.

        Raises UsageError if there is none.
        """
        part = self._part(validation=validation, match=match)
        if not part.names:
            raise UsageError(
                f"none of {len(self.names)} photographs ({self.names[0]} is the first) falls into the "
                f"{'held-out' if validation else 'training'} part, which their names decide; add more"
            )
        return part

    def _part(self, *, validation: bool, match: str = "name") -> "Photographs":
        """As `part`, but it may be empty."""
        chosen = [
            number
            for number, name in enumerate(self.names)
            if is_validation(name if match == "name" else PARTNERS[match](Path(name).stem)) is validation
        ]
        return Photographs(
            tuple(self.names[number] for number in chosen), tuple(self.scenes[number] for number in chosen)
        )

    def patches(
        self, rng: np.random.Generator, *, side_px: int, smallest_scale: float
    ) -> tuple[str, tuple[NDArray[np.uint8], ...]]:
        """One random square patch of every version of a scene, side_px x side_px x 3, and the scene's name.

        It is cut at a scale between `smallest_scale` and 1, log-uniform, shrunk to size, flipped and turned at random;
        of a scene with a smaller side than the patch it is all of that side, enlarged.
        """
        chosen = int(rng.integers(len(self.scenes)))
        versions = [_pixels(picture) for picture in self.scenes[chosen]]
        scale = log_uniform(rng, smallest_scale, 1)
        if rng.random() < 0.3:
            scale = 1.0
        height, width = versions[0].shape[:2]
        source_px = min(round(side_px / scale), height, width)
        top, left = rng.integers(height - source_px + 1), rng.integers(width - source_px + 1)
        mirrored, turns = rng.random() < 0.5, int(rng.integers(1, 4)) if rng.random() < 0.3 else 0

        def cut(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
            crop = image[top : top + source_px, left : left + source_px]
            if source_px != side_px:
                crop = np.asarray(Image.fromarray(crop).resize((side_px, side_px), Image.Resampling.LANCZOS))
            if mirrored:
                crop = crop[:, ::-1]
            return np.ascontiguousarray(np.rot90(crop, turns))

        return self.names[chosen], tuple(cut(image) for image in versions)


def parts(labelled: Mapping[Degradation, Photographs], *, validation: bool) -> dict[Degradation, Photographs]:
    """Of images by label those held out for validation, or the others; a label that has none there is left out."""
    found = {label: images._part(validation=validation) for label, images in labelled.items()}
    return {label: images for label, images in found.items() if images.names}
