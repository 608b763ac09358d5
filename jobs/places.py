"""SRC and OUT: what is refused of them before any work (`UsageError`), and who may work on OUT."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.errors import UsageError
from pipeline.records import first_rows
from pipeline.sink import PARTIAL_NAME, RunDirectory
from pipeline.source import Listing, local_path

LINKS_TRIED = 20
"""Photographs of which one can be linked into OUT, with `--clean link`."""


@contextmanager
def sole_driver(src: Path, out: Path) -> Iterator[None]:
    """Creates OUT, if it is in a fit place, and holds it against a second driver."""
    _require_places(src, out)
    directory = RunDirectory(out)
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with locked(directory.lock_path, out):
        try:
            yield
        finally:
            if not directory.job_path.exists():  # nothing was started: leave nothing behind
                directory.lock_path.unlink(missing_ok=True)
                with suppress(OSError):
                    for path in made:
                        path.rmdir()


@contextmanager
def locked(path: Path, out: Path) -> Iterator[None]:
    """Holds a lock file that is in its place: a call that did not begin may have removed the one that was opened."""
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"another process is working on {out}; wait for it, or end it") from error
            except OSError as error:
                raise UsageError(
                    f"OUT {out} lies on a file system without locks ({error.strerror}), which keep processes off each "
                    "other's work; have it mounted with them (flock), or choose another OUT"
                ) from error
            is_there = False
            with suppress(FileNotFoundError):
                is_there = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
            if is_there:
                yield
                return


def read_job(directory: RunDirectory) -> dict[str, Any] | None:
    """What `job.json` of a run says; None where there is none. Raises UsageError if it is not a run's."""
    if not directory.job_path.exists():
        return None
    try:
        job: dict[str, Any] = json.loads(directory.job_path.read_text(encoding="utf-8", errors="surrogateescape"))
        if not isinstance(job, dict) or not {"config", "config_digest", "source_root", "run_id"} <= job.keys():
            raise ValueError("it lacks config, config_digest, source_root or run_id")
        texts = ("config_digest", "source_root", "run_id")
        if not isinstance(job["config"], dict) or not all(isinstance(job[name], str) for name in texts):
            raise ValueError(f"config is no object, or one of {', '.join(texts)} no text")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{directory.job_path} is not a job of dfpir: {error}") from error
    return job


def _require_places(src: Path, out: Path) -> None:
    """Refuses an OUT that is SRC, inside it or around it, that Ray will remove, or that is no folder."""
    source, target = (Path(os.path.realpath(path)) for path in (src, out))  # `resolve` raises for a loop of links
    for name in (out, RunDirectory(out).images_dir):
        place = Path(os.path.realpath(name))
        is_inside, is_around = _lies_in(place, source), _lies_in(source, place)
        if is_inside and is_around:
            raise UsageError(f"OUT {name} is SRC itself: results would be taken for inputs; choose another OUT")
        if is_inside:
            raise UsageError(f"OUT {name} lies inside SRC {src}: results would be taken for inputs; choose another OUT")
        if is_around:
            raise UsageError(f"SRC {src} lies inside OUT {name}; choose another OUT")
    if "runtime_resources/working_dir_files/" in f"{target}/":
        raise UsageError(f"OUT {out} lies in a folder that Ray removes after the job; give absolute paths")
    if target.exists() and not target.is_dir():
        raise UsageError(f"OUT {out} is a file; give a folder")
    if os.path.lexists(out) and not target.exists():
        raise UsageError(f"OUT {out} is a link to nothing; give a folder")


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether it is the folder or lies below it, under whatever name: a bind mount is another one, and no link."""
    there = os.path.exists(folder)
    return any(
        each == folder or (there and os.path.exists(each) and os.path.samefile(each, folder))
        for each in (path, *path.parents)
    )


def require_names(listing: Listing, directory: RunDirectory) -> None:
    """Refuses a list with results of the run in it, and names that are one where the results go."""
    names = listing.table["relative_path"]
    for images in {directory.images_dir.resolve(), directory.images_dir.absolute()}:  # lists may go by way of links
        if len(found := names.filter(pc.starts_with(listing.table["uri"], f"{images.as_uri()}/"))):
            raise UsageError(f"the list names {len(found)} results of this run, the first {found[0]}; take them out")
    if len(partial := names.filter(pc.match_substring_regex(names, f"(^|/){PARTIAL_NAME}$"))):
        raise UsageError(
            f"the list names {partial[0]} ({len(partial)} such), which is called like a result that is not whole yet; "
            "rename it, or take it out"
        )
    if directory.folds_names():
        folded = pc.utf8_lower(pc.utf8_normalize(names, "NFC"))
        first = first_rows(folded)
        if len(first) < len(names):
            clash = folded[int(np.setdiff1d(np.arange(len(names)), first)[0])]
            both = names.filter(pc.equal(folded, clash)).to_pylist()
            raise UsageError(
                f"OUT {directory.root} lies on a file system for which {both[0]} and {both[1]} are one name, so that "
                f"one result would take the other's place ({len(names) - len(first)} such); choose another OUT, or "
                "rename them"
            )


def require_links(listing: Listing, directory: RunDirectory) -> None:
    """Links a photograph into OUT, since no other way tells for sure whether that can be done."""
    present = listing.table.filter(pc.is_valid(listing.table["modified"]))["uri"]
    faults: list[OSError] = []
    for uri in present[:LINKS_TRIED].to_pylist():
        try:
            directory.try_link(local_path(uri))
        except OSError as error:
            faults.append(error)
        else:
            return  # the others fail alone
    if faults:
        raise UsageError(
            f"--clean link: files of SRC cannot be linked into OUT ({faults[0].strerror}); use copy or skip"
        ) from faults[0]


def require_no_clash(listing: Listing, rows: pa.Table) -> None:
    """A source file that came after a result of its name was written would take that result's place."""
    names = listing.table["relative_path"]
    clashes = names.filter(pc.is_in(names, rows["renamed"].drop_null()))
    if len(clashes):
        raise UsageError(
            f"{clashes[0]} in the source has the name under which another image's result was written "
            f"({len(clashes)} such); rename it, or use another OUT"
        )


def require_writable(path: Path) -> None:
    """Makes a file's folder, and raises OSError, before the work for it is done, if the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()
