"""The field's test sets as they are downloaded: which files belong together."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from classifier.labels import Degradation
from jobs.errors import UsageError
from pipeline.prompting import FORCED_LABELS

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
"""Of photographs, for training and evaluation."""
NOISE_SIGMAS_255 = (15, 25, 50)


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """An image as H x W x 3 uint8, the way up that EXIF tells.

    Raises UsageError naming the file and the fault, and MemoryError.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(_eight_bits(ImageOps.exif_transpose(image)).convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow raises nearly anything, SyntaxError for one
        raise UsageError(f"cannot read {path}: {error}") from error


def as_restored(path: Path) -> NDArray[np.uint8]:
    """An image as `dfpir restore` sees it, H x W x 3 uint8; raises UsageError naming the file and the fault."""
    from pipeline.images import ImageFault, decode, to_uint8  # a bare host, which trains, lacks what it needs

    try:
        return to_uint8(decode(path.read_bytes(), max_pixels=sys.maxsize).visible)
    except (ImageFault, OSError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits or from 0 to 1 in eight bits, to which Pillow would cut it off; other images as they are."""
    if image.mode == "F":
        levels = np.asarray(image)
        if not (np.isfinite(levels).all() and levels.min() >= 0 and levels.max() <= 1):
            raise ValueError("floating-point values beyond 0..1 have no known white level")
        return Image.fromarray(np.rint(levels * 255).astype(np.uint8))
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit integers beyond 0..65535 have no known white level")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def is_photograph(path: Path) -> bool:
    """Whether a file's name says so; one that begins with a dot is another file's shadow, as macOS's archives have."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def with_noise(image: NDArray[np.uint8], sigma_255: int, *, seed: int) -> NDArray[np.uint8]:
    """Gaussian noise as the test sets get it: drawn from sigma and seed, clipped and rounded to eight bits."""
    noise = np.random.default_rng([sigma_255, seed]).normal(0, sigma_255, image.shape)
    return np.rint(np.clip(image + noise, 0, 255)).astype(np.uint8)


@dataclass(frozen=True)
class Example:
    """One image of a test set with its reference; noise is added to the reference where `degraded` is None."""

    name: str
    reference: Path
    degraded: Path | None
    label: Degradation
    sigma_255: int | None = None
    seed: int = 0

    def read(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The degraded image and its reference, H x W x 3 uint8 RGB.

        Raises:
            UsageError: a file cannot be read, or the two are of different sizes.
        """
        reference = as_restored(self.reference)
        if self.degraded is None:
            assert self.sigma_255 is not None
            return with_noise(reference, self.sigma_255, seed=self.seed), reference
        degraded = as_restored(self.degraded)
        if degraded.shape != reference.shape:
            raise UsageError(f"{self.degraded} and its reference {self.reference} are of different sizes")
        return degraded, reference


@dataclass(frozen=True)
class TestSet:
    """How a test set lies on disk.

    Attributes:
        label: what is wrong with its images.
        folders: pairs of folders, degraded and reference, at the root or anywhere below it; the first that is there
            counts. None: clean images, in one of `CLEAN_FOLDERS`, to which noise is added.
        images: how many there are in the published protocol; 0: any number.
        references: how many different references these have; 0: any number.
        match: a key of `PARTNERS`.
        first: the first image's number, where they are numbered without gaps.
        part: the folder of the published part in the whole download, which has others beside it.
    """

    __test__ = False  # for pytest, which takes the name for one of its own

    label: Degradation
    folders: tuple[tuple[str, str], ...] = ()
    images: int = 0
    references: int = 0
    match: str = "name"
    first: int | None = None
    part: str = ""


def _number(stem: str) -> str:
    """`rain-001`, `norain-001x2` and `1` belong together."""
    found = re.search(r"\d+", stem)
    return str(int(found.group())) if found else stem


def _before_underscore(stem: str) -> str:
    """`0001_0.8_0.2` is made from `0001`."""
    return stem.partition("_")[0]


PARTNERS: dict[str, Callable[[str], str]] = {"name": str, "number": _number, "before_underscore": _before_underscore}
"""The part of a file's stem that a degraded image shares with its reference."""


def partnered(degraded: Sequence[Path], references: Sequence[Path], folder: Path, *, match: str) -> dict[Path, Path]:
    """The reference of every degraded image; `match` is a key of `PARTNERS`, `folder` where the references lie.

    Raises UsageError naming an image without one, or two references of the same images.
    """
    partner = PARTNERS[match]
    by_partner: dict[str, Path] = {}
    for path in references:
        if (other := by_partner.setdefault(partner(path.stem), path)) is not path:
            raise UsageError(f"{other} and {path} match the same images")
    found = {}
    for path in degraded:
        if partner(path.stem) not in by_partner:
            raise UsageError(f"{path} has no reference in {folder}")
        found[path] = by_partner[partner(path.stem)]
    return found


CLEAN_FOLDERS = ("original_png", "original", "HR", "image_SRF_4")
"""At the root or anywhere below it; if none is there, the images lie at the root itself."""
INPUT_TARGET = ("input", "target")
PAIR_FOLDERS = (("degraded", "reference"), INPUT_TARGET)

TEST_SETS: dict[str, TestSet] = {
    "sots": TestSet(
        Degradation.HAZE,
        (("hazy", "gt"), ("hazy", "clear"), INPUT_TARGET),
        images=500,
        references=492,  # those of SOTS indoor, 500 images too, are 50
        match="before_underscore",
        part="outdoor",
    ),
    "rain100l": TestSet(
        Degradation.RAIN,
        (("rain", "norain"), ("rainy", "norain"), ("rainy", "gt"), ("rainy", ""), ("rain/X2", "norain"), INPUT_TARGET),
        images=100,
        match="number",
        first=1,
    ),
    "gopro": TestSet(
        Degradation.BLUR,
        (("blur", "sharp"), INPUT_TARGET),
        images=1111,
        part="test",
    ),
    "lol": TestSet(
        Degradation.LOWLIGHT,
        (("low", "high"), INPUT_TARGET),
        images=15,
        part="eval15",
    ),
    "cbsd68": TestSet(Degradation.NOISE, images=68, first=0),
    "kodak24": TestSet(Degradation.NOISE, images=24, first=1),
    "urban100": TestSet(Degradation.NOISE, images=100, first=1),
}
"""By the name that `dfpir evaluate --dataset` knows them under."""


def find_examples(dataset: str, root: Path, *, label: str | None = None, limit: int | None = None) -> list[Example]:
    """The images of a test set below a folder, by name.

    Args:
        dataset: a key of `TEST_SETS`, or `pairs` for folders of one's own, `degraded` and `reference`.
        root: the folder.
        label: of `pairs`, and of nothing else.
        limit: at most so many images, each of a noise set at every strength.

    Raises:
        UsageError: the set is unknown or not there, a file of it is missing, or a file has no reference; the message
            names it.
    """
    if dataset == "pairs":
        if label not in FORCED_LABELS:
            raise UsageError(f"pairs need --label: {', '.join(FORCED_LABELS)}")
        test_set = TestSet(Degradation(label), PAIR_FOLDERS)
    elif dataset not in TEST_SETS:
        raise UsageError(f"unknown test set {dataset!r}; known are {', '.join(TEST_SETS)} and pairs")
    elif label is not None:
        raise UsageError(f"--label is for pairs; {dataset} has its own")
    else:
        test_set = TEST_SETS[dataset]
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder")
    added = not test_set.folders
    found = list(_noisy(root) if added else _paired(test_set, root))
    if not found:
        layouts = " or ".join(
            f"{first}/ and {f'{second}/' if second else 'the folder it lies in'}" for first, second in test_set.folders
        )
        clean = f"clean images in {', '.join(f'{name}/' for name in CLEAN_FOLDERS)}, at any depth, or in it itself"
        wanted = clean if added else f"{layouts}, at any depth, with the images in them and not deeper"
        raise UsageError(f"found no images of {dataset} under {root}; expected {wanted}")
    count = len(found) // len(NOISE_SIGMAS_255) if added else len(found)
    if test_set.images and count != test_set.images:
        raise UsageError(
            f"{root} has {count} images; {dataset} has {test_set.images}: {_amiss(found, count, test_set, root)}"
        )
    references = len({example.reference for example in found})
    if test_set.references and references != test_set.references:
        raise UsageError(
            f"{root} has {count} images of {references} references; {dataset} has {test_set.references} references: "
            f"this is another set than the published one ({test_set.part}), whose figures would not be comparable"
        )
    if added and limit is not None:
        return [example for example in found if example.seed < limit]
    return found[:limit]


def _amiss(found: Sequence[Example], count: int, test_set: TestSet, root: Path) -> str:
    """What is wrong with the number of images: which are missing or too many where names count, or where a set lies."""
    if sets := _sets_below(root, found, test_set.images):
        return f"more than one set lies there; give one of them as --root: {', '.join(map(str, sets))}"
    if test_set.first is not None:
        wanted = set(range(test_set.first, test_set.first + test_set.images))
        by_number = {int(n): example.name for example in found if (n := _number(Path(example.name).name)).isdigit()}
        gaps, odd = sorted(wanted - by_number.keys()), sorted(by_number.keys() - wanted)
        if not odd and len(gaps) == test_set.images - count:
            numbers = "number {} is" if len(gaps) == 1 else "numbers {} are"
            return f"{numbers.format(_first_of(gaps))} not there"
        if not gaps and len(odd) == count - test_set.images:
            return f"move what is not of the set elsewhere: {_first_of([by_number[number] for number in odd])}"
    if count < test_set.images:
        return "look for what is missing"
    names = {name.lower() for example in found for name in example.reference.relative_to(root.parent).parts}
    if test_set.part and test_set.part not in names:
        return f"this is not the published part; give the folder {test_set.part} of the download as --root"
    return "look for what is not of the set"


def _sets_below(root: Path, found: Sequence[Example], images: int) -> list[Path]:
    """The uppermost folders below the root that have just so many images."""
    counts: dict[Path, int] = {}
    for reference, degraded in {(example.reference, example.degraded): None for example in found}:
        place = reference.parent if degraded is None else Path(os.path.commonpath([reference.parent, degraded.parent]))
        for folder in (place, *place.parents):
            if folder == root or root not in folder.parents:
                break
            counts[folder] = counts.get(folder, 0) + 1
    whole = {folder for folder, count in counts.items() if count == images}
    return sorted(folder for folder in whole if not whole & set(folder.parents))


def _first_of(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:5])) + (" and others" if len(values) > 5 else "")


def _places(root: Path) -> list[Path]:
    """The root and every folder below it, links followed; one that several paths lead to counts once, by its own."""
    places: dict[Path, Path] = {}
    starts = [root]
    for start in starts:  # which links found on the way make longer
        for name, inside, _ in os.walk(start):
            folder = Path(name)
            if places.setdefault(folder.resolve(), folder) != folder:
                inside.clear()
            inside.sort()
            starts += [folder / each for each in inside if (folder / each).is_symlink()]
    return sorted(places.values())


def _published(places: list[Path], test_set: TestSet, root: Path) -> list[Path]:
    """Those of the published part where some lie in a folder of its name, otherwise all."""
    inside = [place for place in places if test_set.part in (part.lower() for part in place.relative_to(root).parts)]
    return inside or places


def _noisy(root: Path) -> Iterator[Example]:
    parents = _places(root)
    layouts = [[parent / name for parent in parents] for name in CLEAN_FOLDERS]
    for folders in (*layouts, [root]):
        # Urban100 has its low-resolution versions in the same folder.
        paths = [path for folder in folders for path in _images(folder) if not path.stem.endswith("_LR")]
        for sigma_255 in NOISE_SIGMAS_255:
            for seed, path in enumerate(paths):
                yield Example(path.stem, path, None, Degradation.NOISE, sigma_255, seed)
        if paths:
            return


def _paired(test_set: TestSet, root: Path) -> Iterator[Example]:
    """Pairs of the first layout that is there, in every folder that has it: GoPro has one for each film."""
    parents = _places(root)
    for first, second in test_set.folders:
        places = [parent for parent in parents if _images(parent / first) and _images(parent / second)]
        for parent in _published(places, test_set, root):
            if not test_set.images:
                _require_flat(parent / first, parent / second)
            folder = parent / second
            partners = partnered(_images(parent / first), _images(folder), folder, match=test_set.match)
            if alone := sorted(set(_images(folder)) - set(partners.values())):
                raise UsageError(f"{alone[0]} has no degraded image in {parent / first}")
            for path, reference in partners.items():
                yield Example(str(path.relative_to(root).with_suffix("")), reference, path, test_set.label)
        if places:
            return


def _require_flat(*folders: Path) -> None:
    """Raises UsageError naming a photograph in a folder inside of these: it would be left out in silence."""
    for folder in folders:
        if nested := [path for place in _places(folder) if place != folder for path in _images(place)]:
            raise UsageError(f"{nested[0]} lies deeper than the other images of {folder}; put it there beside them")


def _images(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_photograph(path))
