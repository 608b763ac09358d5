"""The end of a run in figures, all of them read from the manifest."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.records import Outcome, Stage, Status

STAGES = tuple(stage.value for stage in Stage if stage is not Stage.PROCESS)


@dataclass(frozen=True)
class Failure:
    """One image that was not done, for people to read."""

    relative_path: str
    status: str
    stage: str
    error_class: str
    message: str


@dataclass(frozen=True)
class Summary:
    """What a run came to. Means are over all images with a reference; rates are those of this invocation."""

    counts: dict[str, int]
    labels: dict[str, int]
    images_per_s: float
    megapixels_per_s: float
    psnr_input_db: float | None
    psnr_db: float | None
    ssim_input: float | None
    ssim: float | None
    manifest: str
    images: str
    run_id: str
    planned: int
    done_before: int
    """Images whose row was there when this invocation started."""
    elapsed_s: float
    stage_s: dict[str, float]
    failed_fraction: float
    failures: list[Failure] = field(default_factory=list)
    vanished: int = 0
    ignored: int = 0
    """Files of the source that are no candidates."""
    unreadable_directories: tuple[str, ...] = ()
    """Folders of the source that could not be listed: what lies in them is not part of the run."""


SUMMARY_COLUMNS = (
    "image_id", "revision", "relative_path", "status", "label", "stage", "error_class", "error_message",
    "psnr_input_db", "psnr_db", "ssim_input", "ssim",
)  # fmt: skip
"""Of the manifest: what `summarise` looks at."""


class Tally:
    """What this invocation has done, added up as images get done."""

    def __init__(self) -> None:
        self.images = 0
        self.megapixels = 0.0
        self.stage_s = dict.fromkeys(STAGES, 0.0)

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Counts finished images."""
        for outcome in outcomes:
            self.images += 1
            self.megapixels += (outcome.width or 0) * (outcome.height or 0) / 1e6
            for stage in STAGES:
                self.stage_s[stage] += (getattr(outcome, f"{stage}_ms") or 0.0) / 1000


def summarise(
    manifest: pa.Table,
    *,
    run_dir: Path,
    run_id: str,
    planned: int,
    fresh: Tally,
    elapsed_s: float,
    vanished: int = 0,
    ignored: int = 0,
    unreadable_directories: tuple[str, ...] = (),
) -> Summary:
    """Counts and means over the whole manifest (`SUMMARY_COLUMNS`), rates over `fresh` and `elapsed_s` seconds."""
    undone = manifest.filter(pc.is_in(manifest["status"], pa.array([Status.FAILED, Status.QUARANTINED])))
    told = ("relative_path", "status", "stage", "error_class", "error_message")
    return Summary(
        counts=status_counts(manifest),
        labels=label_counts(manifest),
        images_per_s=fresh.images / elapsed_s if elapsed_s > 0 else 0.0,
        megapixels_per_s=fresh.megapixels / elapsed_s if elapsed_s > 0 else 0.0,
        psnr_input_db=pc.mean(manifest["psnr_input_db"]).as_py(),
        psnr_db=_mean(manifest, "psnr_db", "psnr_input_db"),
        ssim_input=pc.mean(manifest["ssim_input"]).as_py(),
        ssim=_mean(manifest, "ssim", "ssim_input"),
        manifest=str(run_dir / "manifest"),
        images=str(run_dir / "images"),
        run_id=run_id,
        planned=planned,
        done_before=manifest.num_rows - fresh.images,
        elapsed_s=elapsed_s,
        stage_s=fresh.stage_s,
        failed_fraction=undone.num_rows / manifest.num_rows if manifest.num_rows else 0.0,
        failures=[Failure(*(row[name] or "" for name in told)) for row in undone[:20].to_pylist()],
        vanished=vanished,
        ignored=ignored,
        unreadable_directories=unreadable_directories,
    )


def status_counts(rows: pa.Table) -> dict[str, int]:
    """How many rows of a manifest have each status."""
    return {str(status): 0 for status in Status} | _counts(rows["status"])


def label_counts(rows: pa.Table) -> dict[str, int]:
    """How many rows of a manifest have each label, the most frequent first."""
    return dict(sorted(_counts(rows["label"].drop_null()).items(), key=lambda item: -item[1]))


def _counts(values: pa.ChunkedArray) -> dict[str, int]:
    return {count["values"]: count["counts"] for count in values.value_counts().to_pylist()}


def _mean(manifest: pa.Table, name: str, fallback: str) -> float | None:
    """Mean of a column over rows with a reference; an image without a result scores as its input."""
    mean: float | None = pc.mean(pc.coalesce(manifest[name], manifest[fallback])).as_py()
    return mean
