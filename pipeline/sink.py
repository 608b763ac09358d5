"""Where a run's results go, and how they get there: a row in a manifest part is the only proof that an image is done.

Everything is written under a temporary name in its final folder, fsynced, and renamed, so that what has a final
name is whole. Images come first, then the part with their rows; parts are never overwritten.

    OUT/.dfpir.lock   held by the one driver
        job.json  summary.json
        plan/     the frozen plan
        images/   results, mirroring the source
        manifest/ <shard>-<random>.parquet
        logs/     worker-*.log, journal/
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import time
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.faults import fault_point
from pipeline.image_records import ImageFault
from pipeline.records import MANIFEST_SCHEMA, SCHEMA_VERSION, Outcome, Stage, Status, first_rows, to_table

PARTIAL_SUFFIX = ".partial"
_NOT_LINKABLE = frozenset({errno.EPERM, errno.EXDEV, errno.EMLINK})
"""Of one file: it is somebody else's and protected (Linux's `protected_hardlinks`), lies elsewhere, or has too many."""

LOCK_WAIT_S = 60.0
"""How long a process of an ended run may take to die."""


class ManifestError(Exception):
    """A manifest part is not what this version writes; the message names the file and what is at odds."""


class OtherRunError(Exception):
    """The folder of a run is not there, or is another run's: not all machines see the same one."""


class ShardBusyError(Exception):
    """Another living process works on the shard."""


@dataclass(frozen=True)
class Written:
    """A file that has its final name."""

    path: Path
    sha256: str
    size_bytes: int


class RunDirectory:
    """The layout of a run, and the only way in which files come into it."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.job_path = self.root / "job.json"
        self.summary_path = self.root / "summary.json"
        self.lock_path = self.root / ".dfpir.lock"
        self.plan_dir = self.root / "plan"
        self.images_dir = self.root / "images"
        self.manifest_dir = self.root / "manifest"
        self.logs_dir = self.root / "logs"
        self.journal_dir = self.logs_dir / "journal"

    def create(self) -> None:
        """Makes the folders that are not there yet."""
        for folder in (self.plan_dir, self.images_dir, self.manifest_dir, self.journal_dir):
            folder.mkdir(parents=True, exist_ok=True)

    def require_run(self, run_id: str) -> None:
        """Raises OtherRunError if this machine sees another folder under the run's path than the driver does."""
        try:
            found = json.loads(self.job_path.read_text(encoding="utf-8", errors="surrogateescape"))["run_id"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found != run_id:
            gone = "cannot be read; was it moved, or its disk unmounted?"
            state = gone if found is None else f"is of run {found}"
            raise OtherRunError(
                f"all machines of a run need the same OUT: on {socket.gethostname()}, {self.job_path} {state}"
            )

    def _require_there(self) -> None:
        """Raises OtherRunError once the folder is gone: made anew it would be no run's, or lie where a disk was."""
        if not self.manifest_dir.exists():
            raise OtherRunError(f"{self.root} is not there any more; was it moved, or its disk unmounted?")

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        """Writes or replaces a JSON file of the run in one step."""
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        _write_whole(path, (text + "\n").encode("utf-8", "surrogateescape"))
        sync_folder(path.parent)

    def image_path(self, relative_path: str) -> Path:
        """Where a result lies; raises ValueError for a path that leads out of `images/`."""
        pure = PurePosixPath(relative_path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise ValueError(f"{relative_path!r} is not a path inside the images folder")
        return self.images_dir / pure

    def _place(self, relative_path: str) -> Path:
        """As `image_path`, for what is to be written; raises ImageFault where a linked folder leads out of `images/`.

        It may lead to the photographs, one of which the result would replace.
        """
        path = self.image_path(relative_path)
        self._require_there()
        if not self.holds(path.parent):
            raise ImageFault(
                Stage.WRITE,
                "linked_folder",
                f"a link leads out of images/: {self.uri(path.parent)}; put a folder there",
            )
        return path

    def holds(self, source: Path) -> bool:
        """Whether a file lies among the results, by way of a symbolic link too."""
        return Path(os.path.realpath(source)).is_relative_to(self._real_images_dir)

    @cached_property
    def _real_images_dir(self) -> str:
        return os.path.realpath(self.images_dir)

    def uri(self, path: Path) -> str:
        """How the manifest names a file of the run: relative to the run's root, so that the run can be moved."""
        return path.relative_to(self.root).as_posix()

    def write_image(self, relative_path: str, data: bytes) -> Written:
        """Writes a result under its name below `images/`; replaces one that an interrupted run has left."""
        path = self._place(relative_path)
        _write_whole(path, data)
        fault_point("after-image", relative_path)
        return Written(path, hashlib.sha256(data).hexdigest(), len(data))

    def link_image(self, relative_path: str, source: Path, data: bytes) -> Written:
        """Hard-links a source file below `images/`; `data` are its bytes.

        Never copies instead. Raises ImageFault for a file that cannot be linked (another device, another owner) or is
        no longer what was read.
        """
        path = self._place(relative_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary = _linked(source, path)
        except OSError as error:
            if error.errno in _NOT_LINKABLE:
                raise ImageFault(Stage.WRITE, "not_linkable", f"{error.strerror}: {source}") from error
            raise
        try:
            if temporary.read_bytes() != data:
                raise ImageFault(Stage.WRITE, "source_changed", "the file changed after it was read")
            fault_point("before-rename", path.name)
            os.replace(temporary, path)
        finally:
            # Renaming one link of a file over another does nothing and leaves the temporary name.
            temporary.unlink(missing_ok=True)
        fault_point("after-image", relative_path)
        return Written(path, hashlib.sha256(data).hexdigest(), len(data))

    def try_link(self, source: Path) -> None:
        """Links a source file into the run and takes the link away again; raises OSError as `link_image` does."""
        _linked(source, self.job_path).unlink()

    def folds_names(self) -> bool:
        """Whether the run's file system takes names for one that differ in case, or in how accents are written."""
        self.root.mkdir(parents=True, exist_ok=True)
        name = temporary_name(self.root / "\u00e9").name
        probe, *others = (  # as UTF-8, whatever the locale encodes names as
            self.root / os.fsdecode(each.encode())
            for each in (name, name.swapcase(), unicodedata.normalize("NFD", name))
        )
        probe.touch()
        try:
            return any(each.exists() for each in others)
        finally:
            probe.unlink()

    def commit_part(self, shard_id: str, outcomes: Sequence[Outcome]) -> Path:
        """Makes rows count: writes them as a new part. The images they speak of must have been written."""
        if not outcomes:
            raise ValueError("a manifest part needs at least one row")
        self._require_there()
        self._sync_image_folders(outcomes)
        one = outcomes[0]
        provenance = {
            "dfpir.run_id": one.run_id,
            "dfpir.config_digest": one.config_digest,
            "dfpir.code_version": one.code_version,
            "dfpir.schema_version": str(SCHEMA_VERSION),
            "dfpir.shard_id": shard_id,
        }
        table = to_table(list(outcomes)).replace_schema_metadata(provenance)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        path = self.manifest_dir / f"{shard_id}-{secrets.token_hex(8)}.parquet"
        _write_whole(path, buffer.getvalue().to_pybytes())
        sync_folder(self.manifest_dir)
        fault_point("after-part", shard_id)
        return path

    def committed(self, shard_id: str) -> set[tuple[str, int]]:
        """(image id, revision) of the rows that a shard's parts hold."""
        table = _read_parts(self._parts_of(shard_id), ["image_id", "revision"])
        return set(zip(table["image_id"].to_pylist(), table["revision"].to_pylist(), strict=True))

    def rows(self, shard_id: str) -> list[Outcome]:
        """What a shard's parts hold."""
        return [
            Outcome(**{**row, "status": Status(row["status"]), "warnings": tuple(row["warnings"])})
            for row in _read_parts(self._parts_of(shard_id), MANIFEST_SCHEMA.names).to_pylist()
        ]

    def _parts_of(self, shard_id: str) -> list[Path]:
        found = parquet_files(self.manifest_dir, beginning=f"{shard_id}-")
        return [part for part in found if part.name.rpartition("-")[0] == shard_id]

    def parts(self) -> list[Path]:
        """Manifest parts, sorted by name; unfinished ones have another ending and are not among them.

        Raises OSError if the folder cannot be listed.
        """
        return parquet_files(self.manifest_dir)

    def await_workers(self, *, wait_s: float = LOCK_WAIT_S) -> None:
        """Waits for processes of an ended call that still work on a shard; raises ShardBusyError if they do not end."""
        for lock in sorted(self.journal_dir.glob("*.lock")):
            with self.shard_lock(lock.stem, wait_s=wait_s):
                pass

    def remove_partials(self) -> int:
        """Removes what interrupted writes have left, and returns how many files that was; no worker may be at it."""
        self.create()
        found = [path for folder in (self.images_dir, self.manifest_dir, self.plan_dir, self.journal_dir)
                 for path in folder.rglob(f".*{PARTIAL_SUFFIX}")]  # fmt: skip
        found += self.root.glob(f".*{PARTIAL_SUFFIX}")
        stale = [path for path in found if is_partial(path)]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)

    def unnamed(self, uris: Collection[str | None]) -> Iterator[str]:
        """Files below `images/` that are not among these (`output_uri` of all rows) and no half-written ones, as `uri`.

        Raises OSError if a folder cannot be listed.
        """

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        named = set(uris)
        for folder, folders, names in os.walk(self.images_dir, onerror=refuse):
            beginning = self.uri(Path(folder))
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for uri in sorted(f"{beginning}/{name}" for name in [*names, *links]):
                if uri not in named and not is_partial(self.root / uri):
                    yield uri

    @contextmanager
    def shard_lock(self, shard_id: str, *, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
        """Holds a shard against other processes; the kernel lets go of it when this process dies."""
        self._require_there()
        self.journal_dir.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_s
        with (self.journal_dir / f"{shard_id}.lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ShardBusyError(
                            f"shard {shard_id} is still held by another process after {wait_s:.0f} s "
                            f"({lock.name}); end that process and run again"
                        ) from None
                    time.sleep(0.1)
            yield

    def _sync_image_folders(self, outcomes: Sequence[Outcome]) -> None:
        """Makes the new names durable, those of new folders included."""
        folders: set[Path] = set()
        for outcome in outcomes:
            if outcome.output_uri is not None:
                path = self.root / outcome.output_uri
                folders.update(p for p in path.parents if p == self.images_dir or self.images_dir in p.parents)
        for folder in sorted(folders):
            sync_folder(folder)


def parquet_files(folder: Path, *, beginning: str = "") -> list[Path]:
    """Those in a folder whose names begin so, sorted by name; none where there is no folder.

    Raises OSError if it cannot be listed: `Path.glob` would take it for empty, and all would be done again.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if name.startswith(beginning) and name.endswith(".parquet")]


def read_manifest(run_dir: Path | str, *, columns: Sequence[str] = MANIFEST_SCHEMA.names) -> pa.Table:
    """All rows of a run, one per image: that of the highest revision, in the order of the relative paths.

    Raises ManifestError if the folder holds no run, or naming a part that is damaged or of another schema.
    """
    if not RunDirectory(run_dir).manifest_dir.is_dir():
        raise ManifestError(f"{run_dir} holds no run: it has no folder manifest")
    order = [
        ("relative_path", "ascending"), ("image_id", "ascending"), ("revision", "descending"),
        ("finished_at", "ascending"),
    ]  # fmt: skip
    table = read_rows(run_dir, columns={*columns, *(name for name, _ in order)}).sort_by(order)
    return table.take(pa.array(first_rows(table["image_id"]))).select(list(columns))


def read_rows(run_dir: Path | str, *, columns: Collection[str], whole: bool = False) -> pa.Table:
    """Every row that was ever committed, those of superseded revisions included, in no order.

    `whole`: the other columns are read, too, to find damage in them. Raises ManifestError naming a part that is damaged
    or of another schema.
    """
    needed = [name for name in MANIFEST_SCHEMA.names if name in columns]
    return _read_parts(RunDirectory(run_dir).parts(), needed, whole=whole)


def done(run_dir: Path | str) -> pa.Table:
    """What has a row, whatever its status: columns `image_id`, `revision`, `status`, `stage` and `renamed`.

    `renamed` is the path below `images/` of a result that has another name than its source, and null elsewhere.
    """
    directory = RunDirectory(run_dir)
    prefix = directory.uri(directory.images_dir) + "/"
    kept = ["image_id", "revision", "status", "stage"]

    def shortened(part: Path) -> pa.Table:
        rows = _read_part(part, ["image_id", "relative_path", "status", "stage", "output_uri", "revision"])
        name = pc.replace_substring_regex(rows["output_uri"], f"^{prefix}", "")
        renamed = pc.if_else(pc.not_equal(name, rows["relative_path"]), name, None)
        return rows.select(kept).append_column("renamed", renamed)

    empty = MANIFEST_SCHEMA.empty_table().select(kept).append_column("renamed", pa.array([], pa.string()))
    return pa.concat_tables([empty, *map(shortened, directory.parts())])


def _read_parts(parts: Sequence[Path], columns: list[str], *, whole: bool = False) -> pa.Table:
    empty = MANIFEST_SCHEMA.empty_table().select(columns)
    return pa.concat_tables([empty, *(_read_part(part, columns, whole=whole) for part in parts)])


def _read_part(path: Path, columns: list[str], *, whole: bool = False) -> pa.Table:
    try:
        # pyarrow takes no path that is not UTF-8
        with path.open("rb") as data, pq.ParquetFile(data, page_checksum_verification=True) as part:
            schema = part.schema_arrow.remove_metadata()
            if not schema.equals(MANIFEST_SCHEMA):
                differing = [f.name for f in MANIFEST_SCHEMA if f.name not in schema.names or schema.field(f.name) != f]
                differing += [name for name in schema.names if name not in MANIFEST_SCHEMA.names]
                raise ManifestError(
                    f"{path} is not of manifest schema version {SCHEMA_VERSION}; differing columns: "
                    f"{', '.join(differing) or 'their order'}. Read it with the version that wrote it."
                )
            rows = part.read(columns=None if whole else columns).select(columns).replace_schema_metadata(None)
            if "image_id" in columns and rows["image_id"].null_count:
                raise ManifestError(f"{path} has rows without image_id; restore it from a copy, or remove it")
            return rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"{path} cannot be read as a manifest part ({error}). Restore it from a copy, "
            "or remove it: its images are then done again."
        ) from error


PARTIAL_NAME = r"\.[^/]*\.[0-9a-f]{16}" + re.escape(PARTIAL_SUFFIX)
"""Of files that are not whole yet."""


def is_partial(path: Path) -> bool:
    """Whether an interrupted write has left this: an image may have a name that ends like such a file's."""
    return re.fullmatch(PARTIAL_NAME, path.name) is not None and not path.is_dir()


def temporary_name(path: Path) -> Path:
    """Beside a file, for what is to become it; see `is_partial`."""
    # Cut short, because the name of a result may already be as long as a file system allows.
    stem = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")
    return path.with_name(f".{stem}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")


def _linked(source: Path, path: Path) -> Path:
    """A hard link, under a temporary name beside `path`, to a file itself where `source` is a symbolic link to it."""
    temporary = temporary_name(path)
    os.link(source.resolve(), temporary)
    return temporary


def _write_whole(path: Path, data: bytes) -> None:
    """Temporary name, fsync, rename. The folder's entry is durable only after `sync_folder`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fault_point("before-rename", path.name)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Makes the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
