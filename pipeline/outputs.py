"""Where an image's output goes, and where its reference is."""

import os
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.source import IMAGE_EXTENSIONS

EXTENSIONS_BY_FORMAT: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"),
}
"""Lower-case extensions by Pillow's format name; the first is the one appended."""


_BETWEEN = ".restored"
"""Comes before the extension of a result whose plain name another image has."""


def restored_name(
    relative_path: str, *, source_format: str, output_format: str, option: str, taken: Callable[[str], bool]
) -> str:
    """Relative path of a restored image. One that is kept as it was has the input's own relative path.

    The name stays if the format does (`--format same`) or if its extension already says it; otherwise the format's
    extension is appended: `a.jpg` becomes `a.jpg.png`. Should the source hold, or have held, an image of that name,
    whose output may need it, `.restored` comes in between: `a.jpg.restored.png`. So no two images share an output
    name, whichever of them are restored.

    Args:
        relative_path: of the source image; its extension is one of `IMAGE_EXTENSIONS`.
        source_format: Pillow's name of what was read.
        output_format: Pillow's name of what is written.
        option: the value of `--format`.
        taken: whether a relative path is, or was, that of a source image.
    """
    if option == "same" and output_format == source_format:
        return relative_path
    extensions = EXTENSIONS_BY_FORMAT[output_format]
    if PurePosixPath(relative_path).suffix.lower() in extensions:
        return relative_path
    stem = relative_path
    # A source image may also have the very name, without an extension, that this one would get.
    while taken(stem + extensions[0]) or (stem != relative_path and taken(stem)):
        stem += _BETWEEN
    return stem + extensions[0]


def source_names(results: pa.Array) -> list[pa.Array]:
    """Names of which images could have results of these names: the same, and those to which an extension was added."""
    names = [results, pc.replace_substring_regex(results, r"\.[^./]*$", "")]
    return [*names, pc.replace_substring_regex(names[1], f"({re.escape(_BETWEEN)})+$", "")]


def reserved_names(planned: pa.ChunkedArray) -> frozenset[str]:
    """Planned names that `restored_name` could give to another planned image's result: `a.jpg.png` beside `a.jpg`."""
    # Nearly always two extensions are needed, which few names have.
    bare = pc.any(pc.match_substring_regex(planned, r"(^|/)[^./]*$")).as_py()
    named = planned.filter(pc.match_substring_regex(planned, r"[^/]\.[^./]*$" if bare else r"\.[^/]*\.[^./]*$"))
    beside = [pc.replace_substring_regex(named, r"\.[^./]*$", "")]
    while pc.any(pc.ends_with(beside[-1], _BETWEEN)).as_py():
        beside.append(pc.replace_substring_regex(beside[-1], f"{re.escape(_BETWEEN)}$", ""))
    # Looked up in the few and not in the plan, of which a table would take as much memory as it does itself.
    others = planned.filter(
        pc.is_in(planned, pa.chunked_array([c for each in beside for c in each.chunks], pa.string()))
    )
    return frozenset(name for each in beside for name in named.filter(pc.is_in(each, others)).to_pylist())


@dataclass(frozen=True)
class Match:
    """A reference image; `others` are further files that would match as well."""

    path: Path
    others: tuple[Path, ...] = ()


class ReferenceIndex:
    """References under a directory, found by relative path without extension.

    Folders are listed as they are needed, and a few are kept: those of a data set would fill a worker's memory.
    Raises ValueError if `root` is not a directory.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ValueError(f"reference {root} is not a directory; give the folder of reference images")
        self.root = root.resolve()
        self._images_in = lru_cache(maxsize=8)(_images_in)

    def find(self, relative_path: str) -> Match | None:
        """The reference of a source image, or None.

        Among several files of that stem the one with the source's own extension wins, else the first by name.
        """
        wanted = PurePosixPath(relative_path)
        folder = self.root / wanted.parent
        names = self._images_in(folder)
        stem = os.path.splitext(wanted.name)[0]
        first, last = (bisect_left(names, stem + end) for end in (".", "/"))  # in order, "/" follows "."
        paths = [folder / name for name in names[first:last] if os.path.splitext(name)[0] == stem]
        if not paths:
            return None
        best = next((path for path in paths if path.suffix == wanted.suffix), paths[0])
        return Match(best, tuple(path for path in paths if path != best))


def _images_in(folder: Path) -> list[str]:
    """Names of image files, sorted; none if there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS)
    except (FileNotFoundError, NotADirectoryError):
        return []
