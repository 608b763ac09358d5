"""The records that flow through a run, and the manifest's schema."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from types import UnionType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from classifier.labels import LABELS

SCHEMA_VERSION = 1


class Status(StrEnum):
    """How an image ended."""

    RESTORED = "restored"
    COPIED = "copied"
    """Already clean: kept as it was."""
    ABSTAINED = "abstained"
    """Too unsure, or damage that the model has no prompt for: kept as it was, for review."""
    FAILED = "failed"
    QUARANTINED = "quarantined"
    """Its processing ended the process twice."""


class Stage(StrEnum):
    """The step of the work in which a fault arose."""

    FETCH = "fetch"
    DECODE = "decode"
    CLASSIFY = "classify"
    RESTORE = "restore"
    MEASURE = "measure"
    ENCODE = "encode"
    WRITE = "write"
    PROCESS = "process"
    """The whole process died."""


def image_id(relative_path: str) -> str:
    """Stable id of an image: 128 bits of a hash of its relative path with `/` separators, in hexadecimal."""
    return hashlib.blake2b(relative_path.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def printable(text: str) -> str:
    """Text in valid UTF-8, with each byte of a file name that is none written `%XX`; unchanged if it already is."""
    return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in text)


_COLUMN_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    Status: pa.string(),
    Stage: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
    tuple[str, ...]: pa.list_(pa.string()),
    dict[str, float]: pa.struct([pa.field(str(label), pa.float32()) for label in LABELS]),
}


def arrow_schema(record: type) -> pa.Schema:
    """A dataclass's fields as columns, in their order; every column may be null."""
    kinds = ((f.name, f.type.__args__[0] if isinstance(f.type, UnionType) else f.type) for f in fields(record))
    return pa.schema([(name, _COLUMN_TYPES[kind]) for name, kind in kinds])


@dataclass(frozen=True)
class ImageRef:
    """A source image without its pixels."""

    image_id: str
    relative_path: str
    """With `/` separators; outputs mirror it."""
    uri: str
    size_bytes: int
    modified: datetime | None
    revision: int = 0
    """Raised by one each time a call finds the file changed, or does it again for another reason."""


IMAGE_REF_SCHEMA = arrow_schema(ImageRef)
"""`ImageRef`'s fields as columns."""


def to_refs(table: pa.Table) -> list[ImageRef]:
    """Rows of a table whose columns are fields of `ImageRef`."""
    return [ImageRef(**row) for row in table.to_pylist()]


@dataclass(frozen=True)
class Shard:
    """Images that are dispatched and retried together; frozen in the plan."""

    shard_id: str
    images: tuple[ImageRef, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One image's row in the manifest: exactly one per planned image, whatever happened.

    Fields are the manifest's columns, in their order; None is null.
    """

    image_id: str
    shard_id: str
    source_uri: str
    source_member: str | None = None
    frame: int | None = None
    relative_path: str
    source_sha256: str | None = None
    source_bytes: int | None = None
    source_modified: datetime | None = None
    source_etag: str | None = None
    source_format: str | None = None
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    bit_depth: int | None = None
    has_alpha: bool | None = None
    exif_orientation: int | None = None

    label: str | None = None
    confidence: float | None = None
    margin: float | None = None
    probabilities: dict[str, float] | None = None
    noise_sigma_255: float | None = None
    classifier: str | None = None
    label_source: str | None = None
    true_label: str | None = None
    decision_reason: str | None = None
    prompt: str | None = None

    status: Status
    stage: Stage | None = None
    error_class: str | None = None
    error_message: str | None = None
    warnings: tuple[str, ...] = ()
    attempt: int | None = None
    tiled: bool | None = None
    tile_px: int | None = None
    batch_size: int | None = None
    dtype: str | None = None
    oom_retries: int | None = None
    worker_id: str | None = None
    host: str | None = None
    device: str | None = None
    started_at: datetime | None = None
    fetch_ms: float | None = None
    decode_ms: float | None = None
    classify_ms: float | None = None
    restore_ms: float | None = None
    measure_ms: float | None = None
    encode_ms: float | None = None
    write_ms: float | None = None

    output_uri: str | None = None
    output_sha256: str | None = None
    output_bytes: int | None = None
    output_format: str | None = None
    output_mode: str | None = None
    output_width: int | None = None
    output_height: int | None = None

    reference_uri: str | None = None
    psnr_input_db: float | None = None
    psnr_db: float | None = None
    ssim_input: float | None = None
    ssim: float | None = None
    clean_probability_before: float | None = None
    clean_probability_after: float | None = None
    change_rmse_255: float | None = None
    clipped_fraction: float | None = None
    suspicious: bool | None = None

    run_id: str
    revision: int = 0
    config_digest: str
    model: str | None = None
    weights_sha256: str | None = None
    code_version: str
    schema_version: int = SCHEMA_VERSION
    finished_at: datetime | None = None


OnOutcomes = Callable[[list[Outcome]], None]
"""What is told of images as they are done."""

MANIFEST_SCHEMA = arrow_schema(Outcome)
"""`docs/manifest.md` says what each column holds."""


def to_table(outcomes: list[Outcome]) -> pa.Table:
    """Rows as an Arrow table of `MANIFEST_SCHEMA`."""
    return pa.Table.from_pylist([vars(outcome) for outcome in outcomes], schema=MANIFEST_SCHEMA)


def first_rows(values: pa.ChunkedArray) -> NDArray[np.intp]:
    """Row numbers of the first occurrence of every value, ascending."""
    codes = values.combine_chunks().dictionary_encode().indices.to_numpy()
    return np.sort(np.unique(codes, return_index=True)[1])
