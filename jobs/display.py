"""What commands that need torch print, for a terminal of 80 columns, and the records behind `--json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from classifier import CLIP_PREFIX
from classifier.clip_classifier import ClipCalibration
from classifier.files import SHIPPED as CLASSIFIERS_DIR
from jobs.config import RestoreOptions
from jobs.restore import Job, find_references
from jobs.table import add, two_columns
from jobs.text import counted, harmless, several
from models.precision import fastest_dtype
from models.registry import list_models
from pipeline.estimate import Estimate
from pipeline.report import Summary


def before(console: Console, job: Job, options: RestoreOptions) -> None:
    """The resolved configuration and the amount of work, ahead of it."""
    config = job.context.config
    lines = {
        "run": f"{job.context.run_id[:12]}, configuration {config.digest[:12]}",
        "model": f"{config.model}, sha256 {config.weights_sha256[:12]}",
        "classifier": f"{config.classifier}, sha256 {config.classifier_sha256[:12]}{_uncalibrated(config.classifier)}",
        "compute": f"{options.engine}, {job.context.device}, {_precision(config.dtype, job.context.device)}",
        "images": f"{job.planned} planned, {job.images_left} left to do, {several(job.ignored, 'other file')} ignored",
    }
    if references := find_references(job):
        lines["references"] = f"{config.reference}, for {references[0]} of {references[1]} images looked at"
    changes = {name: getattr(job.changes, name) for name in ("new", "changed", "again", "vanished")}
    if any(changes.values()) and job.changes.new < job.planned:
        lines["changes"] = counted(changes)
    if job.unreadable_directories:
        lines["unreadable"] = _unreadable(job.unreadable_directories)
    for name, text in lines.items():
        console.print(f"{name:<11}{harmless(text)}", markup=False, soft_wrap=True)


def tell_if_uncalibrated(console: Console, classifier: str) -> None:
    """A line where the classifier of this name is CLIP without a calibration."""
    if hint := _uncalibrated(classifier):
        console.print(f"note: {classifier}{hint}", markup=False, soft_wrap=True)


def after(console: Console, summary: Summary) -> None:
    """The end of a run: counts, rates, time by stage, worst failures, where everything is."""
    table = two_columns()
    add(table, "status", counted(summary.counts))
    add(table, "labels", counted(summary.labels) or "none")
    if summary.images_per_s:
        rates = f"{summary.images_per_s:.2f} images/s, {summary.megapixels_per_s:.2f} MP/s"
        add(table, "speed", f"{rates} in {summary.elapsed_s:.1f} s")
        add(table, "time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary.stage_s.items()))
    else:
        add(table, "speed", "nothing was left to do")
    if summary.psnr_db is not None and summary.psnr_input_db is not None:
        add(table, "PSNR", f"{summary.psnr_input_db:.2f} dB before, {summary.psnr_db:.2f} dB after")
    if summary.ssim is not None and summary.ssim_input is not None:
        add(table, "SSIM", f"{summary.ssim_input:.4f} before, {summary.ssim:.4f} after")
    if summary.vanished:
        add(table, "vanished", f"{several(summary.vanished, 'planned file')}, no longer in the source")
    if summary.unreadable_directories:
        add(table, "unreadable", _unreadable(summary.unreadable_directories))
    add(table, "images", summary.images)
    add(table, "manifest", summary.manifest)
    console.print(table)
    for failure in summary.failures[:5]:
        text = f"{failure.status}: {failure.relative_path}: {failure.stage}, {failure.error_class}: {failure.message}"
        console.print(harmless(text), markup=False, soft_wrap=True)
    undone = summary.counts["failed"] + summary.counts["quarantined"]
    if undone > 5:
        console.print(f"and {undone - 5} more: status 'failed' or 'quarantined' in the manifest")


def plan_record(job: Job, estimated: Estimate) -> dict[str, Any]:
    """The plan as one JSON-ready object, but for `worker_seconds`: how long one worker here will take.

    Sizes and what comes of headers are those of the images left.
    """
    return {
        "images": job.planned,
        "left": job.images_left,
        "ignored": job.ignored,
        "unreadable_directories": len(job.unreadable_directories),
        "shards": len(job.shards),
        "bytes": job.left.size_bytes,
        "sampled": estimated.sampled,
        "megapixels": estimated.megapixels,
        "unreadable_fraction": estimated.unreadable_fraction,
        "output_bytes": estimated.output_bytes,
        "run_dir": str(job.directory.root),
        "config_digest": job.context.config.digest,
    }


def plan(console: Console, record: Mapping[str, Any], unreadable: Sequence[str]) -> None:
    """The plan for people; `unreadable` are folders that could not be listed."""
    table = two_columns()
    add(
        table,
        "images",
        f"{record['images']} in {several(record['shards'], 'shard')}, {record['left']} left to do, "
        f"{several(record['ignored'], 'other file')} ignored",
    )
    if unreadable:
        add(table, "unreadable", _unreadable(unreadable))
    add(
        table, "size", f"{record['bytes'] / 1e6:.1f} MB, about {record['megapixels']:.1f} megapixels "
        f"(from {several(record['sampled'], 'header')}, {record['unreadable_fraction']:.1%} unreadable)"
    )  # fmt: skip
    add(table, "disk", f"about {record['output_bytes'] / 1e6:.1f} MB for the results")
    add(table, "time", f"about {_duration(record['worker_seconds'])} for one worker on this machine, all restored")
    add(table, "written", f"{record['run_dir']}/plan and job.json; no image")
    console.print(table)


def model_records() -> list[dict[str, Any]]:
    """Restoration and classifier weights, JSON-ready."""
    restorers: list[dict[str, Any]] = []
    for spec in list_models():
        size_bytes = spec.file.stat().st_size if spec.file is not None else None
        record = asdict(spec) | {"file": None if spec.file is None else str(spec.file), "size_bytes": size_bytes}
        restorers.append({"kind": "restorer"} | record)
    classifiers = [
        {"kind": "classifier", "name": card.stem} | json.loads(card.read_text(encoding="utf-8"))
        for card in sorted(CLASSIFIERS_DIR.glob("*.json"))
    ]
    return restorers + classifiers


def models(console: Console) -> None:
    """The weights for people, one block each."""
    for record in model_records():
        console.print(f"[bold]{record['name']}[/bold]  {record['kind']}")
        for key, value in record.items():
            if key in {"name", "kind"} or value in (None, {}, [], ()):
                continue
            if isinstance(value, dict):
                value = f"\n{'':<16}".join(_figures(value))
            elif isinstance(value, (list, tuple)):
                value = ", ".join(str(item) for item in value)
            console.print(f"  {key.replace('_', ' '):<14}{value}", markup=False, soft_wrap=True)


def _figures(record: dict[str, Any], prefix: str = "") -> list[str]:
    """`name figure` of each leaf of nested dictionaries."""
    figures = []
    for name, value in record.items():
        full = f"{prefix}{name}"
        figures += _figures(value, f"{full}.") if isinstance(value, dict) else [f"{full} {value}"]
    return figures


def _uncalibrated(classifier: str) -> str:
    """A hint where CLIP is asked without a calibration."""
    if (
        not classifier.startswith(CLIP_PREFIX)
        or ClipCalibration.path(Path(classifier.removeprefix(CLIP_PREFIX))).exists()
    ):
        return ""
    return ", not calibrated: most images will be left alone (`python -m jobs.calibrate_clip --help`)"


def _precision(dtype: str, device: str) -> str:
    """A run's dtype, and a hint where it is the slower one: another machine's run may go on here."""
    emulated = dtype == "bfloat16" and fastest_dtype(device) is torch.float32
    return f"{dtype}, which this processor emulates: float32 is faster here" if emulated else dtype


def _unreadable(folders: Sequence[str]) -> str:
    return f"{several(len(folders), 'folder')}, the first {folders[0]}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"
