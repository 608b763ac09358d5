"""The end of a run in figures, all of them read from the manifest."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.records import Status

STAGES = ("fetch", "decode", "classify", "restore", "measure", "encode", "write")


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

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def summarise(
    manifest: pa.Table,
    *,
    run_dir: Path,
    run_id: str,
    planned: int,
    fresh_ids: set[str],
    elapsed_s: float,
    vanished: int,
) -> Summary:
    """Counts and means over the whole manifest, rates over the rows in `fresh_ids` and `elapsed_s` seconds."""
    rows = manifest.to_pylist()
    fresh = [row for row in rows if row["image_id"] in fresh_ids]
    counts = {str(status): 0 for status in Status} | Counter(row["status"] for row in rows)
    megapixels = sum((row["width"] or 0) * (row["height"] or 0) for row in fresh) / 1e6
    undone = [row for row in rows if row["status"] in (Status.FAILED, Status.QUARANTINED)]
    return Summary(
        counts=counts,
        labels=dict(Counter(row["label"] for row in rows if row["label"]).most_common()),
        images_per_s=len(fresh) / elapsed_s if elapsed_s > 0 else 0.0,
        megapixels_per_s=megapixels / elapsed_s if elapsed_s > 0 else 0.0,
        psnr_input_db=_mean(rows, "psnr_input_db", "psnr_input_db"),
        psnr_db=_mean(rows, "psnr_db", "psnr_input_db"),
        ssim_input=_mean(rows, "ssim_input", "ssim_input"),
        ssim=_mean(rows, "ssim", "ssim_input"),
        manifest=str(run_dir / "manifest"),
        images=str(run_dir / "images"),
        run_id=run_id,
        planned=planned,
        done_before=len(rows) - len(fresh),
        elapsed_s=elapsed_s,
        stage_s={stage: sum(row[f"{stage}_ms"] or 0 for row in fresh) / 1000 for stage in STAGES},
        failed_fraction=len(undone) / len(rows) if rows else 0.0,
        failures=[
            Failure(
                row["relative_path"],
                row["status"],
                row["stage"] or "",
                row["error_class"] or "",
                row["error_message"] or "",
            )
            for row in undone[:20]
        ],
        vanished=vanished,
    )


def _mean(rows: list[dict[str, Any]], name: str, fallback: str) -> float | None:
    """Mean of a column over rows with a reference; an image without a result scores as its input."""
    values = [row[name] if row[name] is not None else row[fallback] for row in rows]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
