"""`dfpir audit`: whether a run is what its manifest says, told from its folder alone, wherever that lies now."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from classifier.labels import Degradation
from jobs.errors import UsageError
from jobs.places import read_job
from pipeline.plan import PlanError, keys, latest_revisions, picked, read_plan
from pipeline.prompting import FORCED_LABELS, prompts_for
from pipeline.records import Status, first_rows
from pipeline.report import label_counts, status_counts
from pipeline.run_config import digest_of
from pipeline.sink import ManifestError, RunDirectory, read_rows
from pipeline.source import local_path

READERS = 8
"""Threads that read files; hashing them lets go of the GIL."""

AT_ONCE = 4096
"""Files that are handed to them at a time."""

OUTPUT_COLUMNS = ("relative_path", "output_uri", "output_bytes", "output_sha256")
SOURCE_COLUMNS = ("relative_path", "source_uri", "source_bytes", "source_sha256")
COLUMNS = (
    "image_id", "revision", "relative_path", "status", "label", "stage", "error_class", "prompt", "warnings",
    "suspicious",
    "source_uri", "source_sha256", "source_bytes", "output_uri", "output_sha256", "output_bytes",
    "run_id", "config_digest", "model", "weights_sha256", "classifier", "dtype", "device", "host", "code_version",
)  # fmt: skip
MADE_BY = ("model", "weights_sha256", "classifier", "dtype", "device", "host", "code_version")
KEPT = (Status.COPIED, Status.ABSTAINED)
DONE = (Status.RESTORED, *KEPT)


Kind = Literal[
    "no_row", "double_row", "not_planned", "other_run", "inconsistent", "output_shared", "output_missing",
    "output_differs", "not_in_manifest", "source_missing", "source_differs",
]  # fmt: skip
"""What may be wrong; `docs/manifest.md` says what each one means."""


@dataclass(frozen=True)
class Finding:
    """Something that does not hold."""

    kind: Kind
    subject: str
    """The image's relative path, or a file's below the run's folder."""
    message: str


@dataclass(frozen=True)
class Audit:
    """What was looked at, and what does not hold of it."""

    run: str
    run_id: str
    source_root: str
    config_digest: str
    planned: int
    rows: int
    """That count: of each planned image, the one of its latest revision."""
    superseded: int
    """Rows of earlier revisions."""
    counts: dict[str, int]
    labels: dict[str, int]
    suspicious: int
    with_warnings: int
    made_by: dict[str, list[str]]
    """Every model, precision, machine and version that rows name."""
    outputs: int
    output_bytes: int
    sources: int | None
    """Inputs that were read; None: not asked for."""
    contents_read: bool
    findings: list[Finding]


@dataclass(frozen=True)
class _File:
    """What a row says of a file."""

    missing: Kind
    differs: Kind
    subject: str
    path: Path
    size_bytes: int
    sha256: str


def audit(
    run_dir: Path, *, contents: bool, sources: bool, watch: Callable[[Iterable[Any], int], Iterable[Any]]
) -> Audit:
    """Holds a run's plan, manifest and files against each other; changes nothing.

    Args:
        run_dir: of `dfpir restore`.
        contents: whether files are read and hashed, and rows with all their columns, or only sizes compared.
        sources: whether the inputs are looked at, too.
        watch: takes the checks of files as they are done, and their number, and gives them on: a progress bar.

    Raises:
        UsageError: there is no run, a call works on it, or its plan or manifest cannot be read.
        OSError: a folder of the run cannot be listed.
    """
    directory = RunDirectory(run_dir)
    job = read_job(directory)
    if job is None:
        raise UsageError(f"{run_dir} holds no run: it has no {directory.job_path.name}")
    with _at_rest(directory):
        return _audit(directory, job, contents=contents, sources=sources, watch=watch)


def _audit(
    directory: RunDirectory,
    job: dict[str, Any],
    *,
    contents: bool,
    sources: bool,
    watch: Callable[[Iterable[Any], int], Iterable[Any]],
) -> Audit:
    run_dir = directory.root
    try:
        ever_planned, rows = read_plan(run_dir), read_rows(run_dir, columns=COLUMNS, whole=contents)
    except (PlanError, ManifestError) as error:
        raise UsageError(str(error)) from error
    planned = latest_revisions(ever_planned)
    of_plan, of_rows = keys(ever_planned), keys(rows)
    is_planned = pc.is_in(of_rows, of_plan.combine_chunks())
    place = pc.index_in(rows["image_id"], planned["image_id"])
    latest = planned["revision"].take(place)
    is_latest = pc.fill_null(pc.equal(rows["revision"], latest), False)
    is_earlier = pc.and_(is_planned, pc.invert(is_latest))
    counting = picked(rows, is_latest)
    is_done = pc.is_in(planned["image_id"], counting["image_id"].combine_chunks())
    findings = [
        *_about(rows.filter(pc.invert(is_planned)), "not_planned", "the plan has no such image, or not this revision"),
        *_about(_several(ever_planned, of_plan), "inconsistent", "planned more than once"),
        *_about(_several(rows, of_rows), "double_row", "several rows for one revision of this image"),
        *_about(planned.filter(pc.invert(is_done)), "no_row", "planned, but not done: the run is unfinished"),
        *_unlike_the_plan(planned.take(place.filter(is_latest)), counting),
        *_unlike_the_job(counting, job),
        *_inconsistent(counting, keeps_copies=job["config"].get("clean") != "skip"),
    ]
    if len(first := first_rows(counting["image_id"])) < counting.num_rows:
        counting = counting.take(pa.array(first))
    outputs, inputs = (counting.select(names).drop_null() for names in (OUTPUT_COLUMNS, SOURCE_COLUMNS))
    findings += [*_shared(counting), *_misnamed(outputs), *_unnamed(directory, rows)]
    files = [_outputs(directory, outputs), *([_inputs(inputs)] if sources else [])]
    total = outputs.num_rows + (inputs.num_rows if sources else 0)
    checks = _checked(chain(*files), contents=contents)
    findings += [found for found in watch(checks, total) if found is not None]
    return Audit(
        run=str(run_dir),
        run_id=job["run_id"],
        source_root=job["source_root"],
        config_digest=job["config_digest"],
        planned=planned.num_rows,
        rows=counting.num_rows,
        superseded=pc.sum(is_earlier).as_py() or 0,
        counts=status_counts(counting),
        labels=label_counts(counting),
        suspicious=pc.sum(counting["suspicious"]).as_py() or 0,
        with_warnings=pc.sum(pc.greater(pc.list_value_length(counting["warnings"]), 0)).as_py() or 0,
        made_by={name: sorted(counting[name].drop_null().unique().to_pylist()) for name in MADE_BY},
        outputs=outputs.num_rows,
        output_bytes=pc.sum(outputs["output_bytes"]).as_py() or 0,
        sources=inputs.num_rows if sources else None,
        contents_read=contents,
        findings=findings,
    )


@contextmanager
def _at_rest(directory: RunDirectory) -> Iterator[None]:
    """Keeps calls off the run; raises UsageError while one works on it. A folder without its lock is a copy."""
    with ExitStack() as stack:
        with suppress(FileNotFoundError):
            lock = stack.enter_context(directory.lock_path.open("rb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"a call is working on {directory.root}; audit it once that has ended") from None
            except OSError:
                pass  # a file system without locks has no run in work either
        yield


def _about(rows: pa.Table, kind: Kind, message: str) -> Iterator[Finding]:
    return (Finding(kind, path, message) for path in rows["relative_path"].to_pylist())


def _several(table: pa.Table, revisions: pa.ChunkedArray) -> pa.Table:
    """The first row of each image's revision that has more than one."""
    found = pc.is_in(revisions, _repeated(revisions).field("values"))
    rows, several = table.filter(found), revisions.filter(found)
    return rows.take(pa.array(first_rows(several)))


def _unlike_the_plan(planned: pa.Table, counting: pa.Table) -> Iterator[Finding]:
    """`planned` has for each row that counts what was planned of its image."""
    for name, planned_name in (("relative_path", "relative_path"), ("source_uri", "uri")):
        others = pc.fill_null(pc.not_equal(counting[name], planned[planned_name]), True)
        yield from _about(counting.filter(others), "inconsistent", f"its {name} is not that of the plan")


def _unlike_the_job(counting: pa.Table, job: dict[str, Any]) -> Iterator[Finding]:
    if digest_of(job["config"]) != job["config_digest"]:
        yield Finding("inconsistent", "job.json", "its config is not what its config_digest was taken of")
    expected = {name: job[name] for name in ("run_id", "config_digest")}
    expected["weights_sha256"] = job["config"].get("weights_sha256")
    for name, value in expected.items():
        others = counting.filter(pc.fill_null(pc.not_equal(counting[name], str(value)), True))
        yield from _about(others, "other_run", f"its {name} is not that of job.json")


def _inconsistent(counting: pa.Table, *, keeps_copies: bool) -> Iterator[Finding]:
    status = counting["status"]
    is_restored = pc.equal(status, Status.RESTORED)
    is_kept, is_done = (pc.is_in(status, pa.array(some)) for some in (KEPT, DONE))
    is_known = pc.is_in(status, pa.array(list(Status)))
    has_output = pc.and_(pc.is_valid(counting["output_uri"]), pc.is_valid(counting["output_sha256"]))
    has_output = pc.and_(has_output, pc.is_valid(counting["output_bytes"]))
    has_fault = pc.and_(pc.is_valid(counting["stage"]), pc.is_valid(counting["error_class"]))
    needs_output = is_done if keeps_copies else is_restored
    rules = {
        "its status is none of this version": pc.invert(is_known),
        "it is done, yet names no output": pc.and_(needs_output, pc.invert(has_output)),
        "it is not done, yet names an output": pc.and_(pc.invert(is_done), pc.is_valid(counting["output_uri"])),
        "it is done, yet has a fault": pc.and_(is_done, pc.is_valid(counting["error_class"])),
        "it is not done, and no fault says why": pc.and_(pc.invert(is_done), pc.invert(has_fault)),
        "its output lies outside of images/": pc.invert(_is_inside(counting["output_uri"])),
        "it is restored, yet under no prompt of its label": pc.and_(is_restored, pc.invert(_has_prompt(counting))),
        "it names a prompt, yet is not restored": pc.and_(is_kept, pc.is_valid(counting["prompt"])),
        "it is copied, yet its label is not clean": pc.and_(
            pc.equal(status, Status.COPIED), pc.fill_null(pc.not_equal(counting["label"], Degradation.CLEAN), True)
        ),
        "it was kept as it was, yet its output is not its input": pc.and_(
            is_kept, pc.fill_null(pc.not_equal(counting["output_sha256"], counting["source_sha256"]), False)
        ),
        "it is done, yet does not say of which file": pc.and_(
            is_done, pc.or_(pc.is_null(counting["source_sha256"]), pc.is_null(counting["source_bytes"]))
        ),
    }
    for message, is_broken in rules.items():
        yield from _about(counting.filter(is_broken), "inconsistent", message)


def _has_prompt(rows: pa.Table) -> pa.ChunkedArray:
    """Whether the prompt is one that the label may lead to."""
    pairs = [f"{label}/{prompt}" for label in FORCED_LABELS for prompt in prompts_for(label)]
    return pc.is_in(pc.binary_join_element_wise(rows["label"], rows["prompt"], "/"), pa.array(pairs))


def _is_inside(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    climbs = pc.match_substring_regex(uris, r"(^|/)\.\.(/|$)")
    return pc.and_(pc.starts_with(uris, "images/"), pc.invert(climbs))


def _shared(counting: pa.Table) -> Iterator[Finding]:
    for shared in _repeated(counting["output_uri"].drop_null()).to_pylist():
        message = f"{shared['counts']} images name this file as their result"
        yield Finding("output_shared", shared["values"], message)


def _misnamed(outputs: pa.Table) -> Iterator[Finding]:
    """A result has its image's own path, or that and something behind a dot."""
    for path, uri, *_ in _tuples(outputs):
        if not f"{uri}.".startswith(f"images/{path}."):
            yield Finding("inconsistent", path, f"its output {uri} is not called after it")


def _repeated(values: pa.ChunkedArray) -> pa.StructArray:
    """Those that occur more than once, with how often: `values` and `counts`."""
    found = values.value_counts()
    return found.filter(pc.greater(found.field("counts"), 1))


def _unnamed(directory: RunDirectory, rows: pa.Table) -> Iterator[Finding]:
    for uri in directory.unnamed(rows["output_uri"].to_pylist()):
        yield Finding("not_in_manifest", uri, "no row names this file")


def _outputs(directory: RunDirectory, rows: pa.Table) -> Iterator[_File]:
    for subject, uri, size_bytes, sha256 in _tuples(rows):
        yield _File("output_missing", "output_differs", subject, directory.root / uri, size_bytes, sha256)


def _inputs(rows: pa.Table) -> Iterator[_File]:
    for subject, uri, size_bytes, sha256 in _tuples(rows):
        try:
            path = local_path(uri)
        except ValueError:  # no file of this machine, and told as one that cannot be read
            path = Path(uri)
        yield _File("source_missing", "source_differs", subject, path, size_bytes, sha256)


def _tuples(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Rows, some at a time: as objects, a million of them take several times as much memory."""
    for part in table.to_batches(max_chunksize=AT_ONCE):
        yield from zip(*(column.to_pylist() for column in part.columns), strict=True)


def _checked(files: Iterator[_File], *, contents: bool) -> Iterator[Finding | None]:
    """What is wrong with each file, in their order."""
    with ThreadPoolExecutor(READERS) as readers:
        while some := list(islice(files, AT_ONCE)):
            yield from readers.map(lambda file: _fault(file, contents=contents), some)


def _fault(file: _File, *, contents: bool) -> Finding | None:
    try:
        with open(file.path, "rb", opener=_open_now) as data:
            size = data.seek(0, 2)
            data.seek(0)
            if size != file.size_bytes:
                message = f"{file.path} has {size:,} bytes; its row says {file.size_bytes:,}"
                return Finding(file.differs, file.subject, message)
            if contents and hashlib.file_digest(data, "sha256").hexdigest() != file.sha256:
                message = f"{file.path} has another SHA-256 than its row says"
                return Finding(file.differs, file.subject, message)
    except (OSError, ValueError) as error:  # the latter of a name that no file can have
        reason = getattr(error, "strerror", None) or error
        return Finding(file.missing, file.subject, f"{file.path} cannot be read ({reason})")
    return None


def _open_now(path: str, flags: int) -> int:
    """Opens a file; a pipe in its place is told by `seek`, instead of waited for."""
    return os.open(path, flags | os.O_NONBLOCK)
