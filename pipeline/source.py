"""The source of a run: which files are images to be, and their bytes."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

from pipeline.images import ImageFault
from pipeline.records import ImageRef, Stage, image_id

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"})
"""In lower case; a file with one of them, in any case, is a candidate."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class SourceError(ValueError):
    """The source cannot be used at all: a usage error, told before any work. `hint` says what to do."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.hint = hint


@dataclass(frozen=True)
class Listing:
    """What a source holds: candidates sorted by relative path, and how many other files there are.

    `unreadable_directories` are relative paths of folders that could not be listed.
    """

    images: tuple[ImageRef, ...]
    ignored: int
    unreadable_directories: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of all candidates together."""
        return sum(image.size_bytes for image in self.images)


def list_source(src: Path) -> Listing:
    """Every image file under a directory, however deep, without opening one.

    Candidates are regular files, and links to them, with a known extension; hidden files and folders count
    like any other. Links to folders are not followed, which also rules out loops. A broken link, and a file
    that cannot be examined, stays a candidate of 0 bytes without a time: it ends as a `failed` row. All
    other entries that are not folders count as ignored. A name that is not UTF-8 gets a relative path
    in which each byte at fault is written `%XX`; its id is of the true name.

    Raises:
        SourceError: `src` is missing, is not a directory, cannot be listed, or holds no candidate.
    """
    if not src.exists():
        raise SourceError(f"source {src} does not exist", hint="check the path")
    if not src.is_dir():
        raise SourceError(f"source {src} is not a directory", hint="give the folder that holds the images")
    root = src.resolve()
    images: dict[str, ImageRef] = {}
    ignored = 0
    unreadable: list[str] = []
    for entry in _walk(os.fspath(root), unreadable):
        ref = _candidate(entry, root)
        if ref is None:
            ignored += 1
            continue
        if ref.relative_path in images:
            stem, dot, extension = ref.relative_path.rpartition(".")
            taken = f"{stem}~{ref.image_id[:8]}{dot}{extension}"
            ref = ImageRef(ref.image_id, taken, ref.uri, ref.size_bytes, ref.modified)
        images[ref.relative_path] = ref
    skipped = tuple(sorted(_printable(os.path.relpath(path, root)) for path in unreadable))
    if "." in skipped:
        raise SourceError(f"source {src} cannot be listed", hint="check its permissions")
    if not images:
        raise SourceError(
            f"no images in {src} ({ignored} other files)",
            hint=f"expected files with one of the extensions {', '.join(sorted(IMAGE_EXTENSIONS))}",
        )
    ordered = sorted(images.values(), key=lambda ref: ref.relative_path)
    return Listing(tuple(ordered), ignored, skipped)


def local_path(uri: str) -> Path:
    """The file that a `file://` URI names, whatever bytes its name has; raises ValueError for another scheme."""
    parts = urlsplit(uri)
    if parts.scheme != "file":
        raise ValueError(f"expected a file:// URI, not {uri}")
    return Path(os.fsdecode(unquote_to_bytes(parts.path)))


def fetch(ref: ImageRef) -> bytes:
    """The whole file of an image.

    Raises:
        ImageFault: at the fetch stage; `missing`, `permission_denied` or `unreadable`.
    """
    try:
        return local_path(ref.uri).read_bytes()
    except FileNotFoundError as error:
        raise ImageFault(Stage.FETCH, "missing", "the file is not there any more, or is a broken link") from error
    except PermissionError as error:
        raise ImageFault(Stage.FETCH, "permission_denied", "the file may not be read: permission denied") from error
    except OSError as error:
        raise ImageFault(Stage.FETCH, "unreadable", f"the file cannot be read: {error.strerror or error}") from error


def _walk(directory: str, unreadable: list[str]) -> Iterator["os.DirEntry[str]"]:
    """All entries below a directory that are not folders themselves, in the order of their names."""
    try:
        with os.scandir(directory) as entries:
            ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError:
        unreadable.append(directory)
        return
    for entry in ordered:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, unreadable)
        else:
            yield entry


def _candidate(entry: "os.DirEntry[str]", root: Path) -> ImageRef | None:
    """The reference to an image file, or None for anything else."""
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS:
        return None
    size_bytes, modified = 0, None
    try:
        status = entry.stat()
    except OSError:
        pass
    else:
        if not stat.S_ISREG(status.st_mode):
            return None
        size_bytes = status.st_size
        modified = _EPOCH + timedelta(microseconds=status.st_mtime_ns // 1000)
    relative = Path(entry.path).relative_to(root).as_posix()
    uri = "file://" + quote_from_bytes(os.fsencode(entry.path))
    return ImageRef(image_id(relative), _printable(relative), uri, size_bytes, modified)


def _printable(path: str) -> str:
    """A path in valid UTF-8; unchanged if it already is."""
    return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in path)
