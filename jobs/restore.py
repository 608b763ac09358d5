"""One restoration from request to summary: check, plan, run what is left, sum up."""

import os
import platform
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from classifier import CLIP_PREFIX, classifier_sha256
from classifier.errors import ClassifierWeightsError
from classifier.files import shipped_names
from classifier.labels import Degradation
from jobs.config import RestoreOptions
from jobs.errors import RunError, UsageError
from jobs.networks import DTYPES, resolve_dtype, resolve_run_device
from jobs.places import read_job, require_links, require_names, require_no_clash
from jobs.runner import WHOLE_PIXELS, Runner
from models.dfpir import DFPIRConfig
from models.errors import WeightsError
from models.memory import bytes_needed
from models.registry import list_models, resolve
from pipeline.outputs import ReferenceIndex, reserved_names, source_names
from pipeline.plan import PlanChanges, PlanError, Shards, load_plan, update_plan
from pipeline.prompting import parse_label, prompts_for
from pipeline.records import OnOutcomes, Outcome, Stage, Status
from pipeline.report import SUMMARY_COLUMNS, Summary, Tally, summarise
from pipeline.run_config import RunConfig, RunContext
from pipeline.sink import (
    ManifestError,
    RunDirectory,
    ShardBusyError,
    done,
    is_partial,
    read_manifest,
    read_rows,
)
from pipeline.source import Listing, SourceError, list_source


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
        version = " and the version of dfpir" * (begun.get("algorithm_version") != config.algorithm_version)
        raise UsageError(
            f"{out} holds a run of another configuration:\n  "
            + "\n  ".join(differences)
            + f"\nUse another OUT, or the options{version} of the first call to go on with that run."
        )
    if job is None and out.exists() and any(p != directory.lock_path and not is_partial(p) for p in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no run; give an empty or new folder as OUT")
    if job is not None and job["source_root"] != str(src.resolve()):
        raise UsageError(f"{out} holds a run over {job['source_root']}, not {src.resolve()}; use another OUT")
    require_names(listing, directory)
    if config.clean == "link":
        require_links(listing, directory)
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
        require_no_clash(listing, rows)
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
    elapsed_s = time.monotonic() - started  # to read the manifest of a million images takes a minute by itself
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
        elapsed_s=elapsed_s,
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
