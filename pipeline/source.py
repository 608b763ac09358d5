"""The source of a run: which files are images to be, and their bytes."""

import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from pipeline.images import ImageFault
from pipeline.records import IMAGE_REF_SCHEMA, ImageRef, Stage, first_rows, image_id, printable

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"}
)
"""In lower case; a file with one of them, in any case, is a candidate."""


class SourceError(ValueError):
    """The source cannot be used at all: a usage error, told before any work; the message says what to do."""


LIST_SUFFIXES = frozenset({".txt", ".csv", ".parquet"})
"""A file of names: one path per line, or a column `path`."""

LISTING_SCHEMA = pa.schema([field for field in IMAGE_REF_SCHEMA if field.name != "revision"])

_Row = tuple[str, str, str, int, int | None]
"""`LISTING_SCHEMA`'s columns; the time as microseconds since 1970."""

_ROWS_AT_ONCE = 10_000

_EARLIEST, _LATEST = -62_135_596_800_000_000, 253_402_300_799_999_999
"""Microseconds since 1970 of the years 1 to 9999, beyond which Python knows no dates but file systems do."""


@dataclass(frozen=True)
class Listing:
    """What a source holds: candidates, and how many other files there are.

    `table` has a row per candidate and the columns of `LISTING_SCHEMA`: a million of them would be several times as
    large as Python objects. `unreadable_directories` are relative paths of folders that could not be listed.
    """

    table: pa.Table
    ignored: int
    unreadable_directories: tuple[str, ...] = ()


def list_source(src: Path) -> Listing:
    """Every image file under a directory, however deep, or every file that a list names; opens no image.

    Raises:
        SourceError: `src` is missing, is neither, cannot be read, or holds no candidate.
    """
    if not src.exists():
        raise SourceError(f"source {src} does not exist; check the path")
    if src.is_dir():
        return _list_folder(src)
    if src.is_file() and src.suffix.lower() in LIST_SUFFIXES:
        return _read_list(src)
    raise SourceError(
        f"source {src} is not a directory, nor a list of files; give the folder that holds the images, or their paths "
        "as .txt (one per line), .csv or .parquet (a column `path`)"
    )


def _list_folder(src: Path) -> Listing:
    """Candidates are regular files, and links to them, with a known extension, in the order of their paths.

    Hidden files and folders count like any other, but for the `._NAME` that macOS puts beside NAME. Links to folders
    are not followed, which also rules out loops. A broken link, and a file that cannot be examined, stays a candidate
    of 0 bytes without a time: it ends as a `failed` row. All other entries that are not folders count as ignored. A
    name that is not UTF-8 gets a relative path in which each byte at fault is written `%XX`; its id is of the true
    name.
    """
    root = os.fspath(src.resolve())
    prefix = os.path.join(root, "")
    ignored = 0
    unreadable: list[str] = []
    rewritten: list[_Row] = []

    def candidates() -> Iterator[_Row]:
        nonlocal ignored
        for entry in _walk(root, unreadable):
            if os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS or _is_companion(entry):
                ignored += 1
                continue
            try:
                status = entry.stat()
            except OSError:
                status = None
            if status is not None and not stat.S_ISREG(status.st_mode):
                ignored += 1
                continue
            true_name = entry.path[len(prefix) :]
            row = _row(true_name, entry.path, status)
            if row[1] == true_name:
                yield row
            else:
                rewritten.append(row)

    table = _to_table(candidates())
    if rewritten:
        table = _with_rewritten(table, rewritten)
    skipped = tuple(sorted(printable(os.path.relpath(path, root)) for path in unreadable))
    if "." in skipped:
        raise SourceError(f"source {src} cannot be listed; check its permissions")
    if not table.num_rows:
        raise SourceError(
            f"no images in {src} ({ignored} other files); expected files with one of the extensions "
            f"{', '.join(sorted(IMAGE_EXTENSIONS))}"
        )
    return Listing(table, ignored, skipped)


def _is_companion(entry: "os.DirEntry[str]") -> bool:
    """Whether this holds what macOS knows of a file beside it, on disks that cannot hold that otherwise."""
    return entry.name.startswith("._") and os.path.lexists(entry.path[: -len(entry.name)] + entry.name[2:])


def _with_rewritten(table: pa.Table, rewritten: list[_Row]) -> pa.Table:
    """Adds names that are not UTF-8; one that reads like another file's name gets part of its id."""
    names = Counter(row[1] for row in rewritten)
    taken = set(table.filter(pc.is_in(table["relative_path"], pa.array(list(names))))["relative_path"].to_pylist())

    def distinct(row: _Row) -> _Row:
        if names[row[1]] == 1 and row[1] not in taken:
            return row
        stem, dot, extension = row[1].rpartition(".")
        return (row[0], f"{stem}~{row[0][:8]}{dot}{extension}", *row[2:])

    return pa.concat_tables([table, _to_table(map(distinct, rewritten))]).sort_by("relative_path")


def _read_list(src: Path) -> Listing:
    """Files named by a list, in its order, whatever their extension; relative paths are relative to its folder.

    A file that is not there, or cannot be examined, stays a candidate of 0 bytes without a time. Outputs mirror the
    path below the list's folder, and for a file outside it the absolute path. A file named again counts as ignored.
    """
    root = os.fspath(src.resolve().parent)
    prefix = os.path.join(root, "")
    as_given = os.path.join(os.path.abspath(src.parent), "")
    names = 0
    # Of paths, and of relative paths: all different, they rule out repeats in a fraction of the memory.
    hashes = array("q"), array("q")

    def candidates() -> Iterator[_Row]:
        nonlocal names
        for name in _names_in(src):
            names += 1
            if "\0" in name:
                raise SourceError(f"list {src} has a path with a NUL in it; is it UTF-16? save it as UTF-8")
            path = os.path.join(root, name)
            if ".." in name.split("/"):  # behind a link it leads to where the link's target lies
                path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            path = os.path.normpath(path)
            if path.startswith("//"):  # which POSIX lets mean something else
                path = path[1:]
            if path.startswith(as_given):  # by way of a link
                path = prefix + path[len(as_given) :]
            try:
                status = os.stat(path)
            except OSError:
                status = None
            row = _row(path.removeprefix(prefix).lstrip("/"), path, status)
            for seen, text in zip(hashes, (path, row[1]), strict=True):
                seen.append(hash(text))
            yield row

    try:
        table = _to_table(candidates())
    except (pa.ArrowException, OSError, UnicodeError, KeyError) as error:
        raise SourceError(
            f"list {src} cannot be read ({error}); expected one path per line (.txt), or a column `path` (.csv, "
            ".parquet)"
        ) from error
    if not table.num_rows:
        raise SourceError(f"list {src} names no file; expected one path per line, or a column `path`")
    may_repeat = any(len(np.unique(np.frombuffer(seen, np.int64))) < len(seen) for seen in hashes)
    if may_repeat and len(files := first_rows(table["uri"])) < table.num_rows:
        table = table.take(pa.array(files))
    if may_repeat and len(results := first_rows(table["relative_path"])) < table.num_rows:
        clash = np.setdiff1d(np.arange(table.num_rows), results)[0]
        both = table.filter(pc.equal(table["relative_path"], table["relative_path"][clash]))["uri"].to_pylist()
        raise SourceError(
            f"list {src} names two files whose results would have one name: {' and '.join(both)}; put the list into a "
            "folder above both, or rename one"
        )
    return Listing(table, names - table.num_rows)


def _names_in(src: Path) -> Iterator[str]:
    """The paths in a list, a few at a time."""
    if src.suffix.lower() == ".txt":
        with src.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for line in lines:
                if line.strip():
                    yield line.rstrip("\r\n")
        return
    if src.suffix.lower() == ".csv":
        convert = csv.ConvertOptions(include_columns=["path"], column_types={"path": pa.string()})
        # Without it a list is cut into blocks at any line break, one inside quotes as well.
        parse = csv.ParseOptions(newlines_in_values=True)
        with csv.open_csv(src, convert_options=convert, parse_options=parse) as reader:
            for batch in reader:
                yield from filter(None, batch["path"].to_pylist())
        return
    with src.open("rb") as data, pq.ParquetFile(data) as file:  # pyarrow takes no path that is not UTF-8
        if "path" not in file.schema_arrow.names:
            raise KeyError(f"its columns are {', '.join(file.schema_arrow.names)}")
        kind = file.schema_arrow.field("path").type
        if pa.types.is_primitive(kind):  # numbers, dates and the like, of which no cast makes paths
            raise KeyError(f"its column path holds {kind}")
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["path"]):
            yield from filter(None, batch["path"].cast(pa.string()).to_pylist())


def _row(true_name: str, path: str, status: os.stat_result | None) -> _Row:
    """A candidate; `true_name` is its path below the source."""
    uri = "file://" + quote_from_bytes(os.fsencode(path))
    if status is None or not stat.S_ISREG(status.st_mode):
        return image_id(true_name), printable(true_name), uri, 0, None
    modified = min(max(status.st_mtime_ns // 1000, _EARLIEST), _LATEST)
    return image_id(true_name), printable(true_name), uri, status.st_size, modified


def _to_table(rows: Iterator[_Row]) -> pa.Table:
    batches = []
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        columns = [
            pa.array(column, field.type) for column, field in zip(zip(*some, strict=True), LISTING_SCHEMA, strict=True)
        ]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA))
    return pa.Table.from_batches(batches, LISTING_SCHEMA)


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
    path = local_path(ref.uri)
    try:
        if not path.is_file() and path.exists():
            raise ImageFault(Stage.FETCH, "unreadable", "not a regular file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageFault(Stage.FETCH, "missing", "the file is not there any more, or is a broken link") from error
    except PermissionError as error:
        raise ImageFault(Stage.FETCH, "permission_denied", "the file may not be read: permission denied") from error
    except OSError as error:
        raise ImageFault(Stage.FETCH, "unreadable", f"the file cannot be read: {error.strerror or error}") from error


def is_gone(source_root: str, missing: ImageRef, shard: Sequence[ImageRef]) -> bool:
    """Whether an image that is missing went with its source as a whole, or with a part of it.

    A part, since a list has no folder of its own and volumes may be mounted below one, is gone if the image's folder
    is, and with it every image of its shard that was there when this call began (those have a time).
    """
    if _is_unmounted(source_root):
        return True
    return (
        missing.modified is not None
        and _is_unmounted(local_path(missing.uri).parent)
        and not any(os.path.lexists(local_path(ref.uri)) for ref in shard if ref.modified is not None)
    )


def _is_unmounted(folder: str | Path) -> bool:
    """Whether a folder is not there, or empty, as one is that nothing is mounted on."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except NotADirectoryError:
        return False  # a list
    except OSError:
        return True


def _walk(root: str, unreadable: list[str]) -> Iterator["os.DirEntry[str]"]:
    """All entries below a directory that are not folders themselves, in the order of their paths."""
    levels = [iter(_entries(root, unreadable))]
    while levels:
        for entry, is_folder in levels[-1]:
            if is_folder:
                levels.append(iter(_entries(entry.path, unreadable)))
                break
            yield entry
        else:
            levels.pop()


def _entries(directory: str, unreadable: list[str]) -> list[tuple["os.DirEntry[str]", bool]]:
    """What a directory holds, in the order of the paths in it, and whether each is a folder."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except OSError:
        unreadable.append(directory)
        return []
    # A folder's slash takes part: `a-b.png` comes before `a/2.png`.
    return sorted(found, key=lambda each: os.fsencode(each[0].name) + (b"/" if each[1] else b""))
