"""The plan: which images make up a run, cut into shards and frozen on disk.

Each call that finds something new adds one file, `OUT/plan/<generation>.parquet`; none is ever changed.
"""

import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.images import Header, ImageFault, encoded_format, read_header
from pipeline.records import ImageRef, Shard
from pipeline.sink import PARTIAL_SUFFIX
from pipeline.source import Listing, local_path

MAX_SHARD_BYTES = 64 * 2**20
MAX_SHARD_IMAGES = 64
FEWEST_SHARDS = 8
"""A small job is cut into about as many shards, so that several workers have something to do."""
FEWEST_IMAGES = 4
"""A shard is not cut smaller than this for the sake of their number."""

PLAN_SCHEMA = pa.schema(
    [
        ("shard_id", pa.string()),
        ("image_id", pa.string()),
        ("relative_path", pa.string()),
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("modified", pa.timestamp("us", tz="UTC")),
        ("revision", pa.int64()),
    ]
)


class PlanError(Exception):
    """A file of the plan is not what this version writes; the message names it."""


@dataclass(frozen=True)
class PlanChanges:
    """What a listing added to the plan.

    `new` and `changed` count images, and `shards` hold both. `vanished` ones are no longer in the source;
    those without a row end as failed rows.
    """

    new: int
    changed: int
    vanished: tuple[ImageRef, ...]
    shards: tuple[Shard, ...]


def cut_shards(images: Sequence[ImageRef], *, first_index: int = 0) -> list[Shard]:
    """Cuts images, in their order, into shards of at most 64 MiB (or one larger image) and 64 images."""
    most_images = min(MAX_SHARD_IMAGES, max(FEWEST_IMAGES, -(-len(images) // FEWEST_SHARDS)))
    groups: list[list[ImageRef]] = []
    size_bytes = 0
    for image in images:
        if not groups or len(groups[-1]) == most_images or size_bytes + image.size_bytes > MAX_SHARD_BYTES:
            groups.append([])
            size_bytes = 0
        groups[-1].append(image)
        size_bytes += image.size_bytes
    return [Shard(f"{first_index + i:05d}", tuple(group)) for i, group in enumerate(groups)]


def update_plan(run_dir: Path | str, listing: Listing) -> PlanChanges:
    """Brings a plan up to date with its source; the first call makes it.

    Shards that exist stay as they are. New files go into new shards; so do files whose size or time
    has changed, with their revision raised by one. A file that can no longer be examined counts as vanished.
    """
    planned = _read_plan(run_dir)
    latest = {image.image_id: image for shard in planned for image in shard.images}
    new, changed = [], []
    for image in listing.images:
        known = latest.get(image.image_id)
        if known is None:
            new.append(image)
        elif image.modified is not None and (image.size_bytes, image.modified) != (known.size_bytes, known.modified):
            changed.append(replace(image, revision=known.revision + 1))
    present = {image.image_id for image in listing.images if image.modified is not None}
    vanished = [i for i in latest.values() if i.image_id not in present and i.modified is not None]
    first_index = 1 + max((int(shard.shard_id) for shard in planned), default=-1)
    shards = cut_shards([*new, *changed], first_index=first_index)
    if shards:
        _write_generation(Path(run_dir) / "plan", shards)
    return PlanChanges(len(new), len(changed), tuple(vanished), tuple(shards))


def load_plan(run_dir: Path | str) -> list[Shard]:
    """All shards of a run with the latest revision of each image; empty before the first `update_plan`.

    Raises PlanError for a damaged plan.
    """
    shards = _read_plan(run_dir)
    latest = {image.image_id: image.revision for shard in shards for image in shard.images}
    current = [Shard(s.shard_id, tuple(i for i in s.images if i.revision == latest[i.image_id])) for s in shards]
    return [shard for shard in current if shard.images]


def _generations(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if path.stem.isdigit())


def _read_plan(run_dir: Path | str) -> list[Shard]:
    """Every shard ever planned, in order, superseded revisions included."""
    images: dict[str, list[ImageRef]] = {}
    for path in _generations(Path(run_dir) / "plan"):
        try:
            with pq.ParquetFile(path) as file:
                table = file.read()
            if not table.schema.remove_metadata().equals(PLAN_SCHEMA):
                raise PlanError(f"{path} has columns {table.schema.names}, expected {PLAN_SCHEMA.names}")
        except (pa.ArrowInvalid, OSError) as error:
            raise PlanError(f"{path} cannot be read as a plan ({error}); start again with a new OUT") from error
        for row in table.to_pylist():
            shard_id = row.pop("shard_id")
            images.setdefault(shard_id, []).append(ImageRef(**row))
    return [Shard(shard_id, tuple(refs)) for shard_id, refs in images.items()]


def _write_generation(folder: Path, shards: Sequence[Shard]) -> None:
    """Adds the next file of the plan: whole and durable, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    existing = _generations(folder)
    number = int(existing[-1].stem) + 1 if existing else 0
    columns = [name for name in PLAN_SCHEMA.names if name != "shard_id"]
    rows = [
        {"shard_id": shard.shard_id} | {name: getattr(image, name) for name in columns}
        for shard in shards
        for image in shard.images
    ]
    path = folder / f"{number:05d}.parquet"
    temporary = folder / f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    try:
        with temporary.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=PLAN_SCHEMA), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, refuses to replace a generation that another driver has written meanwhile.
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What a run will take

SAMPLE_IMAGES = 1_000

BYTES_PER_PIXEL = {"JPEG": 0.7, "PNG": 1.9, "WEBP": 0.5, "TIFF": 2.0, "BMP": 3.0, "PPM": 3.0}
"""Typical size of a restored colour photograph at the default quality, by Pillow's name of the format."""


@dataclass(frozen=True)
class Estimate:
    """What a run is likely to take, extrapolated from the headers of `sampled` of its `images`.

    `formats` counts the readable ones of the sample. `seconds` is None without a known speed.
    """

    images: int
    sampled: int
    unreadable: int
    formats: dict[str, int]
    megapixels_mean: float
    megapixels: float
    output_bytes: int
    seconds: float | None

    @property
    def unreadable_fraction(self) -> float:
        """Share of the sample whose header could not be read."""
        return self.unreadable / self.sampled if self.sampled else 0.0


def estimate(
    listing: Listing,
    *,
    megapixels_per_s: float | None,
    output_format: str = "same",
    sample_images: int = SAMPLE_IMAGES,
    seed: int = 0,
) -> Estimate:
    """Size of the work, disk for its outputs and time, from the headers of a seeded random sample.

    Args:
        listing: the images to be done.
        megapixels_per_s: speed of all workers together, or None if it is not known.
        output_format: `same`, `png`, `jpeg` or `webp`.
        sample_images: read this many headers at most.
        seed: of the sample.
    """
    headers: list[Header] = []
    rng = np.random.default_rng(seed)
    sampled = min(sample_images, len(listing.images))
    for index in sorted(rng.choice(len(listing.images), size=sampled, replace=False)):
        try:
            with local_path(listing.images[index].uri).open("rb") as file:
                headers.append(read_header(file))
        except (ImageFault, OSError):
            continue
    scale = len(listing.images) / sampled if sampled else 0.0
    megapixels = [header.width * header.height / 1e6 for header in headers]
    written = sum(
        size * 1e6 * BYTES_PER_PIXEL[encoded_format(header.format, output_format)]
        for size, header in zip(megapixels, headers, strict=True)
    )
    total = sum(megapixels) * scale
    return Estimate(
        images=len(listing.images),
        sampled=sampled,
        unreadable=sampled - len(headers),
        formats=dict(Counter(header.format for header in headers).most_common()),
        megapixels_mean=sum(megapixels) / len(headers) if headers else 0.0,
        megapixels=total,
        output_bytes=round(written * scale),
        seconds=total / megapixels_per_s if megapixels_per_s else None,
    )
