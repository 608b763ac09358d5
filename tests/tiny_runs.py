"""Runs in miniature: a few small pictures, planned without a plan on disk."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.records import ImageRef, Outcome, Shard, Status, to_refs
from pipeline.run_config import RunConfig, RunContext
from pipeline.sink import RunDirectory, read_manifest
from pipeline.source import list_source


@dataclass(frozen=True)
class TinyWeights:
    model: Path
    model_sha256: str
    classifier: Path
    classifier_sha256: str


@dataclass(frozen=True)
class TinyRun:
    """A planned run that nothing has been done for yet."""

    source: Path
    directory: RunDirectory
    context: RunContext
    shards: tuple[Shard, ...]

    @property
    def refs(self) -> dict[str, ImageRef]:
        """By relative path."""
        return {ref.relative_path: ref for shard in self.shards for ref in shard.images}


def write_pictures(folder: Path, names: Sequence[str], *, side: int = 24) -> None:
    """A different picture for each name: gradients and noise, `side` by `side + 8` pixels."""
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        ramp = np.linspace(40, 200, side + 8)[None, :, None] + np.zeros((side, 1, 3))
        pixels = np.clip(ramp + rng.normal(0, 10 + number, ramp.shape), 0, 255).astype(np.uint8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def config_of(weights: TinyWeights | None = None, **changes: object) -> RunConfig:
    """The configuration of a tiny run: everything under the prompt `rain`, unless changed."""
    fields: dict[str, object] = {
        "model": str(weights.model) if weights else "fake",
        "weights_sha256": weights.model_sha256 if weights else "0" * 64,
        "classifier": str(weights.classifier) if weights else "fake",
        "classifier_sha256": weights.classifier_sha256 if weights else "1" * 64,
        "label": "rain",
        "noise_sigma_255": None,
        "reference": None,
        "output_format": "same",
        "quality": 95,
        "clean": "copy",
        "dtype": "float32",
        "tile": "off",
        "min_confidence": None,
        "second_look": True,
        "max_pixels": 10_000_000,
    }
    return RunConfig(**(fields | changes))  # type: ignore[arg-type]


def plan_run(source: Path, out: Path, config: RunConfig, *, per_shard: int = 3) -> TinyRun:
    """Cuts the images under `source` into shards of so many, without a plan on disk."""
    refs = to_refs(list_source(source).table)
    shards = tuple(
        Shard(f"s{start // per_shard:03d}", refs[start : start + per_shard]) for start in range(0, len(refs), per_shard)
    )
    context = RunContext(
        run_id="run",
        run_dir=str(out),
        source_root=str(source.resolve()),
        config=config,
        code_version="test",
        device="cpu",
        threads=1,
        least_gpu_bytes=2**30,
        commit_every_s=60.0,
    )
    directory = RunDirectory(out)
    directory.create()
    directory.write_json(directory.job_path, {"run_id": context.run_id})
    return TinyRun(source, directory, context, shards)


def rows_of(run: TinyRun) -> dict[str, dict[str, Any]]:
    """The manifest's rows by relative path."""
    return {row["relative_path"]: row for row in read_manifest(run.directory.root).to_pylist()}


def check_complete(run: TinyRun) -> dict[str, dict[str, Any]]:
    """Asserts that every input has exactly one row and every output its hash, with nothing left over."""
    parts = [row for part in run.directory.parts() for row in pq.read_table(part).to_pylist()]
    assert sorted(row["relative_path"] for row in parts) == sorted(run.refs)
    rows = rows_of(run)
    outputs = {row["output_uri"]: row for row in rows.values() if row["output_uri"] is not None}
    images = {path for path in run.directory.images_dir.rglob("*") if path.is_file()}
    assert {run.directory.uri(path) for path in images} == set(outputs)
    for uri, row in outputs.items():
        assert hashlib.sha256((run.directory.root / uri).read_bytes()).hexdigest() == row["output_sha256"]
    assert list(run.directory.root.rglob("*.partial")) == []
    return rows


VARYING = {"attempt", "worker_id", "host", "started_at", "finished_at", "batch_size"}


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what differs between two runs of the same plan: timings and who did it."""
    return {name: value for name, value in row.items() if name not in VARYING and not name.endswith("_ms")}


def outcome_of(ref: ImageRef, shard_id: str, status: Status = Status.RESTORED) -> Outcome:
    """The row of an image of which nothing but its end matters."""
    return Outcome(
        image_id=ref.image_id, shard_id=shard_id, source_uri=ref.uri, relative_path=ref.relative_path,
        status=status, run_id="run", config_digest="d", code_version="1", finished_at=datetime.now(UTC),
    )  # fmt: skip


def stalled_process(marker: Path) -> int:
    """Waits until a process has stalled at its fault point; its id."""
    deadline = time.monotonic() + 400
    while not (marker.exists() and marker.read_text()):
        assert time.monotonic() < deadline, "no process has come to its fault point"
        time.sleep(0.05)
    return int(marker.read_text())
