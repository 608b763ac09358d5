"""Where an image's output goes, and where its reference is."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.source import IMAGE_EXTENSIONS

EXTENSIONS_BY_FORMAT: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"),
}
"""Lower-case extensions by Pillow's format name; the first is the one appended."""


def restored_name(
    relative_path: str, *, source_format: str, output_format: str, option: str, taken: Callable[[str], bool]
) -> str:
    """Relative path of a restored image. One that is kept as it was has the input's own relative path.

    The name stays if the format does (`--format same`) or if its extension already says it; otherwise the format's
    extension is appended: `a.jpg` becomes `a.jpg.png`. Should the source hold an image of that name, whose output
    may need it, `.restored` comes in between: `a.jpg.restored.png`. So no two images share an output name,
    whichever of them are restored.

    Args:
        relative_path: of the source image; its extension is one of `IMAGE_EXTENSIONS`.
        source_format: Pillow's name of what was read.
        output_format: Pillow's name of what is written.
        option: the value of `--format`.
        taken: whether a relative path is that of a source image.
    """
    if option == "same" and output_format == source_format:
        return relative_path
    extensions = EXTENSIONS_BY_FORMAT[output_format]
    if PurePosixPath(relative_path).suffix.lower() in extensions:
        return relative_path
    stem = relative_path
    while taken(stem + extensions[0]):
        stem += ".restored"
    return stem + extensions[0]


@dataclass(frozen=True)
class Match:
    """A reference image; `others` are further files that would match as well."""

    path: Path
    others: tuple[Path, ...] = ()


class ReferenceIndex:
    """References under a directory, found by relative path without extension.

    Raises ValueError if `root` is not a directory.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ValueError(f"reference {root} is not a directory; give the folder of reference images")
        self.root = root.resolve()
        found: dict[str, list[Path]] = {}
        for directory, folders, names in os.walk(self.root):
            folders.sort()
            for name in sorted(names):
                path = Path(directory, name)
                if path.suffix.lower() in IMAGE_EXTENSIONS:
                    found.setdefault(_without_extension(path.relative_to(self.root).as_posix()), []).append(path)
        self._by_stem = found

    def __len__(self) -> int:
        return sum(len(paths) for paths in self._by_stem.values())

    def find(self, relative_path: str) -> Match | None:
        """The reference of a source image, or None.

        Among several files of that stem the one with the source's own extension wins, else the first by name.
        """
        paths = self._by_stem.get(_without_extension(relative_path), [])
        if not paths:
            return None
        suffix = PurePosixPath(relative_path).suffix
        best = next((path for path in paths if path.suffix == suffix), paths[0])
        return Match(best, tuple(path for path in paths if path != best))


def _without_extension(relative_path: str) -> str:
    return PurePosixPath(relative_path).with_suffix("").as_posix()
