"""One restoration from request to summary: check, plan, run what is left, sum up."""

import fcntl
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from classifier import CLIP_PREFIX, classifier_sha256, load_classifier
from classifier.base import Classifier
from classifier.errors import ClassifierWeightsError
from classifier.files import shipped_names
from classifier.labels import Degradation
from jobs.config import RestoreOptions
from jobs.errors import RunError, UsageError
from jobs.runner import WHOLE_PIXELS, Runner
from models import Restorer, load_restorer, parse_tile
from models.dfpir import DFPIRConfig
from models.errors import WeightsError
from models.memory import bytes_needed, keep_freed_memory
from models.precision import fastest_dtype
from models.registry import list_models, resolve
from pipeline.estimate import Estimate, estimate
from pipeline.outputs import ReferenceIndex, reserved_names, source_names
from pipeline.plan import PlanChanges, PlanError, Shards, load_plan, update_plan
from pipeline.prompting import parse_label, prompts_for
from pipeline.records import OnOutcomes, Outcome, Stage, Status, first_rows
from pipeline.report import SUMMARY_COLUMNS, Summary, Tally, summarise
from pipeline.run_config import RunConfig, RunContext
from pipeline.sink import (
    PARTIAL_NAME,
    ManifestError,
    RunDirectory,
    ShardBusyError,
    done,
    is_partial,
    read_manifest,
    read_rows,
)
from pipeline.source import Listing, SourceError, list_source, local_path
from pipeline.worker import WINDOW_IMAGES

# Arrow's own allocators hold twice what a plan of a million images takes, and give little of it back.
pa.set_memory_pool(pa.system_memory_pool())


@dataclass(frozen=True)
class Job:
    """A planned run: what it is, where it lies, and what is left to do."""

    directory: RunDirectory
    context: RunContext
    changes: PlanChanges
    shards: Shards
    """All of the plan."""
    left: Shards
    """The images without a row."""
    ignored: int
    unreadable_directories: tuple[str, ...]
    """Folders of the source that could not be listed."""

    @property
    def planned(self) -> int:
        """Images in the plan."""
        return self.shards.image_count

    @property
    def images_left(self) -> int:
        """Images without a row."""
        return self.left.image_count


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where there is one; asking for what is not there is an error."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible here; use --device cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_run_device(options: RestoreOptions) -> str:
    """As `resolve_device`, but of the cluster where the run is to take place on one that is there already."""
    address = options.address or os.environ.get("RAY_ADDRESS") or None
    if options.engine == "local" or address is None or options.device == "cpu":
        return resolve_device(options.device)
    from jobs.ray_cluster import all_nodes, connected

    with connected(address, threads=1):
        has_gpu = any(node["Resources"].get("GPU") for node in all_nodes() if node["Alive"])
    if options.device == "cuda" and not has_gpu:
        raise UsageError(f"--device cuda: the Ray cluster at {address} has no GPU; use --device cpu or auto")
    return "cuda" if has_gpu else "cpu"


DTYPES = ("float32", "bfloat16")

LINKS_TRIED = 20
"""Photographs of which one can be linked into OUT, with `--clean link`."""


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` becomes what is fastest on the device (`models.precision.fastest_dtype`)."""
    return str(fastest_dtype(device)).removeprefix("torch.") if dtype == "auto" else dtype


def code_version() -> str:
    """Version of the installed package."""
    try:
        return version("dfpir")
    except PackageNotFoundError:
        return "unknown"


def prepare(src: Path, out: Path, options: RestoreOptions) -> Job:
    """Checks everything that can be checked before any work, then writes or extends the plan.

    Raises `UsageError` with what to do.
    """
    try:
        listing = list_source(src)
    except SourceError as error:
        raise UsageError(str(error)) from error
    pa.default_memory_pool().release_unused()
    device = resolve_run_device(options)
    directory = RunDirectory(out)
    job = read_job(directory)
    if job is not None:
        directory.create()
        try:
            directory.await_workers()  # what they still commit is of the run that there is
        except ShardBusyError as error:
            raise UsageError(str(error)) from error
    begun = job["config"] if job is not None and (directory.parts() or any(directory.images_dir.glob("*"))) else None
    if begun is not None and options.dtype == "auto" and begun.get("dtype") in DTYPES:
        options = options.model_copy(update={"dtype": begun["dtype"]})  # wherever it was begun
    config, network = _resolve(options, device)
    if begun is not None and (differences := config.differences(begun)):
        raise UsageError(
            f"{out} holds a run of another configuration:\n  "
            + "\n  ".join(differences)
            + "\nUse another OUT, or the options of the first call to go on with that run."
        )
    if job is None and out.exists() and any(p != directory.lock_path and not is_partial(p) for p in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no run; give an empty or new folder as OUT")
    if job is not None and job["source_root"] != str(src.resolve()):
        raise UsageError(f"{out} holds a run over {job['source_root']}, not {src.resolve()}; use another OUT")
    _check_names(listing, directory)
    if config.clean == "link":
        _check_links(listing, directory)
    context = RunContext(
        run_id=job["run_id"] if job else uuid.uuid4().hex,
        run_dir=str(out.resolve()),
        source_root=str(src.resolve()),
        config=config,
        code_version=code_version(),
        device=device,
        threads=torch.get_num_threads(),
        least_gpu_bytes=bytes_needed(WHOLE_PIXELS, network, getattr(torch, config.dtype), "cuda"),
    )
    if job is None or job["config_digest"] != config.digest:
        directory.write_json(directory.job_path, _job_record(context, options))
    try:
        rows = done(out)
        _refuse_clashes(listing, rows)
        again = _to_do_again(rows, listing, failed_too=options.retry_failed)
        changes = update_plan(out, listing, limit=options.limit, again=again)
        ignored, unreadable_directories = listing.ignored, listing.unreadable_directories
        present = _present(listing) if changes.vanished else None
        del listing  # as large as the plan
        pa.default_memory_pool().release_unused()
        shards = load_plan(out)
        left = shards.without(rows)
        if present is not None:
            left = left.seen(present)  # a worker that misses others has lost sight of the source
    except (PlanError, ManifestError) as error:
        raise UsageError(str(error)) from error
    context = replace(context, reserved=reserved_names(shards.table["relative_path"]))
    pa.default_memory_pool().release_unused()
    return Job(
        directory=directory,
        context=context,
        changes=changes,
        shards=shards,
        left=left,
        ignored=ignored,
        unreadable_directories=unreadable_directories,
    )


def load_networks(options: RestoreOptions) -> tuple[Restorer, Classifier]:
    """The restorer and the classifier that the options name, where and in the precision that these say.

    Raises UsageError if weights are at fault.
    """
    return _load_restorer(options), _load_classifier(options)


def _load_restorer(options: RestoreOptions) -> Restorer:
    device, dtype = _device_and_dtype(options)
    try:
        return load_restorer(options.model, device=device, dtype=dtype, tile=parse_tile(options.tile))
    except (WeightsError, ValueError) as error:
        raise UsageError(str(error)) from error


def _load_classifier(options: RestoreOptions) -> Classifier:
    device, dtype = _device_and_dtype(options)
    try:
        return load_classifier(options.classifier, device=device, dtype=dtype)
    except ClassifierWeightsError as error:
        raise UsageError(str(error)) from error


def _device_and_dtype(options: RestoreOptions) -> tuple[str, torch.dtype]:
    device = resolve_device(options.device)
    return device, getattr(torch, resolve_dtype(options.dtype, device))


def worker_seconds(options: RestoreOptions, *, images: float, megapixels: float) -> float:
    """How long one worker here takes for images that have so many megapixels together, if it restores them all.

    By medians of three, on noise: what the network takes grows with an image, what the classifier takes does not.
    """
    if not images:
        return 0.0
    pa.default_memory_pool().release_unused()
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    # One network at a time, since both together hold more than the plan of a million images.
    seconds = megapixels * _seconds_to_restore(image, options) / (image[..., 0].size / 1e6)
    if options.label == "auto":
        seconds += images * _seconds_to_classify(image, options) * (1 + options.second_look)
    return seconds


def _seconds_to_restore(image: NDArray[np.uint8], options: RestoreOptions) -> float:
    restorer = _load_restorer(options)
    keep_freed_memory()  # as a worker does
    return _median_seconds(lambda: restorer.restore([image], restorer.prompts.keys[:1]))


def _seconds_to_classify(image: NDArray[np.uint8], options: RestoreOptions) -> float:
    """Of one image among as many as a worker asks about at once."""
    classifier, count = _load_classifier(options), WINDOW_IMAGES[resolve_device(options.device)]
    return _median_seconds(lambda: classifier.predict([image] * count)) / count


def _median_seconds(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def estimate_job(job: Job) -> Estimate:
    """Pixels of the images left and disk for their results, from a sample of their headers."""
    return estimate(job.left.table["uri"], output_format=job.context.config.output_format)


def find_references(job: Job) -> tuple[int, int] | None:
    """Of up to a thousand images of the plan, how many have a reference, and how many were looked at; None without."""
    if job.context.config.reference is None:
        return None
    names = job.shards.table["relative_path"]
    index = ReferenceIndex(Path(job.context.config.reference))
    sample = np.unique(np.linspace(0, len(names) - 1, min(1000, len(names))).astype(int))
    found = 0
    for number in sample:
        with suppress(OSError):  # a folder that cannot be listed costs the figures alone
            found += index.find(names[int(number)].as_py()) is not None
    return found, len(sample)


def _to_do_again(rows: pa.Table, listing: Listing, *, failed_too: bool) -> pa.Table:
    """Rows that do not settle their image: of files that could not be read and are there now, or of all faults."""
    if failed_too:
        return rows.filter(pc.is_in(rows["status"], pa.array([Status.FAILED, Status.QUARANTINED])))
    unread = rows.filter(pc.fill_null(pc.equal(rows["stage"], Stage.FETCH), False))
    return unread.filter(pc.is_in(unread["image_id"], _present(listing))) if unread else unread


def _present(listing: Listing) -> pa.Array:
    """Ids of the images that are there."""
    return listing.table["image_id"].filter(pc.is_valid(listing.table["modified"])).combine_chunks()


@contextmanager
def sole_driver(src: Path, out: Path) -> Iterator[None]:
    """Creates OUT, if it is in a fit place, and holds it against a second driver."""
    _check_places(src, out)
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
        with path.open("w") as lock:
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


def run(job: Job, runner: Runner, *, on_outcomes: OnOutcomes) -> Summary:
    """Works off what is left and returns the summary, also written to `summary.json`."""
    job.directory.remove_partials()
    if job.left:
        _remove_leftovers(job)
    fresh = Tally()

    def collect(outcomes: list[Outcome]) -> None:
        fresh.add(outcomes)
        on_outcomes(outcomes)

    started = time.monotonic()
    if job.left:
        runner.run(job.left, job.context, on_outcomes=collect)
    try:
        manifest = read_manifest(job.directory.root, columns=SUMMARY_COLUMNS)
    except ManifestError as error:
        raise RunError(str(error)) from error
    if missing := job.shards.without(manifest):
        raise RunError(
            f"{missing.image_count} planned images have no row in {job.directory.manifest_dir}, the first of them "
            f"{missing.table['relative_path'][0]}; do all machines see the same OUT? The same command does them again."
        )
    summary = summarise(
        manifest,
        run_dir=job.directory.root,
        run_id=job.context.run_id,
        planned=job.planned,
        fresh=fresh,
        elapsed_s=time.monotonic() - started,
        vanished=job.changes.vanished,
        ignored=job.ignored,
        unreadable_directories=job.unreadable_directories,
    )
    job.directory.write_json(job.directory.summary_path, asdict(summary))
    return summary


def _remove_leftovers(job: Job) -> None:
    """Removes results of images without a row: an interrupted call left them, and the next may write others, or none.

    A file that a row names, be it of an earlier revision, stays, and so does one that is no result of these images.
    """
    directory = job.directory
    rows = read_rows(directory.root, columns=["output_uri"])
    unnamed = directory.unnamed(rows["output_uri"].to_pylist())
    uris = [uri for uri in unnamed if os.fsencode(uri).decode(errors="ignore") == uri]  # as all results are
    names = pc.replace_substring_regex(pa.array(uris, pa.string()), f"^{directory.uri(directory.images_dir)}/", "")
    left = job.left.table["relative_path"]
    for sources in source_names(names):
        is_result = pc.is_in(sources, left.filter(pc.is_in(left, sources)).combine_chunks())
        for name in names.filter(is_result).to_pylist():
            directory.image_path(name).unlink(missing_ok=True)


def make_runner(options: RestoreOptions) -> Runner:
    """The runner that `--engine` names."""
    if options.engine == "local":
        from jobs.local import LocalRunner

        return LocalRunner(max_workers=options.max_workers)
    try:
        from jobs.ray_runner import RayRunner
    except ImportError as error:
        raise UsageError(f"Ray cannot be imported ({error}); install it, or use --engine local") from error

    return RayRunner(address=options.address, max_workers=options.max_workers)


def _resolve(options: RestoreOptions, device: str) -> tuple[RunConfig, DFPIRConfig]:
    """The run's configuration and the network's; looks at the weights, so that a fault of theirs stops the run here.

    Only whether a classifier's tensors fit its architecture is left to the workers.
    """
    if options.reference is not None and not options.reference.is_dir():
        raise UsageError(f"--reference {options.reference} is not a folder")
    label, sigma = parse_label(options.label)
    try:
        checkpoint = resolve(options.model).load()
        classifier_hash = classifier_sha256(options.classifier)
    except (WeightsError, ClassifierWeightsError) as error:
        raise UsageError(str(error)) from error
    if checkpoint.network.config.is_ablation:
        raise UsageError(
            f"{options.model} is an ablation without DGCPM or CAAPM: such networks are only trained and validated"
        )
    if label != "auto" and not set(prompts_for(Degradation(label))) & set(checkpoint.prompts.keys):
        raise UsageError(f"--label {label}: {options.model} has prompts for {', '.join(checkpoint.prompts.keys)} only")
    config = RunConfig(
        model=_absolute(options.model),
        weights_sha256=checkpoint.sha256,
        classifier=_absolute(options.classifier),
        classifier_sha256=classifier_hash,
        label=label,
        noise_sigma_255=sigma,
        reference=str(options.reference.resolve()) if options.reference else None,
        output_format=options.format,
        quality=options.quality,
        clean=options.clean,
        dtype=resolve_dtype(options.dtype, device),
        tile=options.tile,
        min_confidence=options.min_confidence,
        second_look=options.second_look,
        max_pixels=options.max_pixels,
    )
    return config, checkpoint.network.config


def _absolute(name_or_path: str) -> str:
    """A path must mean the same in a worker's working directory; a name stays one, whatever lies in this directory."""
    if name_or_path in {*shipped_names(), *(spec.name for spec in list_models())}:
        return name_or_path
    prefix = CLIP_PREFIX if name_or_path.startswith(CLIP_PREFIX) else ""
    path = Path(name_or_path.removeprefix(prefix))
    return f"{prefix}{path.resolve()}" if path.is_file() else name_or_path


def _check_places(src: Path, out: Path) -> None:
    source, target = (Path(os.path.realpath(path)) for path in (src, out))  # `resolve` raises for a loop of links
    if target == source:
        raise UsageError(f"OUT {out} is SRC itself: results would be taken for inputs; choose another OUT")
    if source in target.parents:
        raise UsageError(f"OUT {out} lies inside SRC {src}: results would be taken for inputs; choose another OUT")
    if target in source.parents:
        raise UsageError(f"SRC {src} lies inside OUT {out}; choose another OUT")
    if "runtime_resources/working_dir_files/" in f"{target}/":
        raise UsageError(f"OUT {out} lies in a folder that Ray removes after the job; give absolute paths")
    if target.exists() and not target.is_dir():
        raise UsageError(f"OUT {out} is a file; give a folder")
    if os.path.lexists(out) and not target.exists():
        raise UsageError(f"OUT {out} is a link to nothing; give a folder")


def _check_names(listing: Listing, directory: RunDirectory) -> None:
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


def _check_links(listing: Listing, directory: RunDirectory) -> None:
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


def _refuse_clashes(listing: Listing, rows: pa.Table) -> None:
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


def _job_record(context: RunContext, options: RestoreOptions) -> dict[str, Any]:
    return {
        "run_id": context.run_id,
        "source_root": context.source_root,
        "config": asdict(context.config),
        "config_digest": context.config.digest,
        "options": options.model_dump(mode="json"),
        "versions": {
            "dfpir": context.code_version,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "device": context.device,
        "host": platform.node(),
    }
