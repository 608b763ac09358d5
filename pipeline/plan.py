"""The plan: which images make up a run, cut into shards and frozen on disk.

Each call that finds something new adds one file, `OUT/plan/<generation>.parquet`; none is ever changed.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.records import IMAGE_REF_SCHEMA, Shard, to_refs
from pipeline.sink import parquet_files, sync_folder, temporary_name
from pipeline.source import Listing

# Arrow's own allocators hold twice what a plan of a million images takes, and give little of it back.
pa.set_memory_pool(pa.system_memory_pool())

MAX_SHARD_BYTES, MOST_SHARD_BYTES = 64 * 2**20, 2**30
MAX_SHARD_IMAGES = 64
MANY_SHARDS = 512
"""From so many on shards grow instead, to four times as many images and 16 times the bytes: a manifest of many small
parts is slow to list and to read."""
FEWEST_SHARDS = 8
"""A small job is cut into about as many shards, so that several workers have something to do."""
FEWEST_IMAGES = 4
"""A shard is not cut smaller than this for the sake of their number."""
_ROW_GROUP_ROWS = 100_000
_WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems say that know no hard links."""

PLAN_SCHEMA = pa.schema([("shard_id", pa.string()), *IMAGE_REF_SCHEMA])
_UNUSED = ("shard_id", "relative_path", "uri")
"""Columns that take most of a plan's memory, and that bringing it up to date hardly needs."""


class PlanError(Exception):
    """A file of the plan is not what this version writes; the message names it."""


class Shards(Sequence[Shard]):
    """Shards that lie in a table until they are asked for: as objects, images take several times as much.

    `table` has the columns of `PLAN_SCHEMA`; the rows of a shard follow one another.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        codes = table["shard_id"].combine_chunks().dictionary_encode().indices.to_numpy()
        self._edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), table.num_rows] if len(codes) else [0]

    def __len__(self) -> int:
        return len(self._edges) - 1

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> "Shards": ...

    def __getitem__(self, index: int | slice) -> "Shard | Shards":
        if isinstance(index, slice):
            numbers = range(len(self))[index]
            return Shards(pa.concat_tables([self._rows(i) for i in numbers]) if numbers else self.table[:0])
        rows = self._rows(range(len(self))[index])
        return Shard(rows["shard_id"][0].as_py(), tuple(to_refs(rows.drop_columns("shard_id"))))

    @property
    def image_count(self) -> int:
        """In all shards together."""
        return int(self.table.num_rows)

    @property
    def size_bytes(self) -> int:
        """Of all images together."""
        return pc.sum(self.table["size_bytes"]).as_py() or 0

    def without(self, done: pa.Table) -> "Shards":
        """What is left when the images in `done` (columns `image_id` and `revision`) are taken away."""
        return Shards(picked(self.table, pc.invert(pc.is_in(keys(self.table), keys(done))))) if done else self

    def seen(self, image_ids: pa.Array) -> "Shards":
        """The same, but that images not among these lose their time, like those that cannot be examined."""
        is_seen = pc.is_in(self.table["image_id"], image_ids)
        times = pc.if_else(is_seen, self.table["modified"], None)
        column = PLAN_SCHEMA.get_field_index("modified")
        return Shards(self.table.set_column(column, PLAN_SCHEMA.field(column), times))

    def _rows(self, number: int) -> pa.Table:
        return self.table[self._edges[number] : self._edges[number + 1]]


@dataclass(frozen=True)
class PlanChanges:
    """Images that a listing added to the plan: `new`, `changed`, and done `again` on request.

    `vanished` counts those that are no longer in the source; the ones without a row end as failed rows.
    """

    new: int
    changed: int
    again: int
    vanished: int


def cut_shards(images: pa.Table, *, first_index: int = 0) -> Shards:
    """Cuts images, in order, into shards of at most 64 MiB (or one larger image) and 64 images.

    In large jobs it is up to 1 GiB and 256 images. `images` has the columns of `IMAGE_REF_SCHEMA`.
    """
    count = images.num_rows
    most_images = min(MAX_SHARD_IMAGES, max(FEWEST_IMAGES, -(-count // FEWEST_SHARDS)))
    most_images = max(most_images, min(4 * MAX_SHARD_IMAGES, count // MANY_SHARDS))
    ends = np.cumsum(images["size_bytes"].to_numpy())
    most_bytes = max(MAX_SHARD_BYTES, min(MOST_SHARD_BYTES, int(ends[-1]) // MANY_SHARDS)) if count else 0
    edges = [0]
    while edges[-1] < count:
        start = edges[-1]
        before = ends[start - 1] if start else 0
        fitting = int(np.searchsorted(ends, before + most_bytes, side="right"))
        edges.append(min(max(fitting, start + 1), start + most_images, count))
    ids = pa.array([f"{first_index + i:05d}" for i in range(len(edges) - 1)], pa.string())
    column = ids.take(pa.array(np.repeat(np.arange(len(ids)), np.diff(edges))))
    return Shards(images.select(IMAGE_REF_SCHEMA.names).add_column(0, PLAN_SCHEMA.field("shard_id"), column))


def update_plan(
    run_dir: Path | str, listing: Listing, *, limit: int | None = None, again: pa.Table | None = None
) -> PlanChanges:
    """Brings a plan up to date with its source; the first call makes it.

    Shards that exist stay as they are. New files go into new shards; so do files whose size or time
    has changed, and those in `again` (columns `image_id` and `revision`), with their revision raised by one. A file
    that can no longer be examined counts as vanished. `limit` leaves out of the listing what lies behind that many
    images and is not planned yet.
    """
    planned = latest_revisions(read_plan(run_dir, [name for name in PLAN_SCHEMA.names if name not in _UNUSED]))
    listed = listing.table
    where = _places(listed["image_id"], planned["image_id"])
    if limit is not None:
        kept = pc.or_(pa.array(np.arange(listed.num_rows) < limit), pc.is_valid(where))
        listed, where = listed.filter(kept), where.filter(kept)
    new = _with_revision(picked(listed, pc.is_null(where)), 0)
    if new.num_rows and planned.num_rows:
        names = read_plan(run_dir, ["relative_path"])["relative_path"]
        if len(both := names.filter(pc.is_in(names, new["relative_path"].combine_chunks()))):
            raise PlanError(
                f"{both[0]} is the name of two images once bytes that are not UTF-8 are written out, and one has been "
                "planned before; rename the other, or use another OUT"
            )
    known, before = pc.indices_nonzero(pc.is_valid(where)), where.drop_null()

    def differing(name: str) -> pa.ChunkedArray:
        return pc.not_equal(listed[name].take(known), planned[name].take(before))

    differs = pc.or_(differing("size_bytes"), pc.fill_null(differing("modified"), True))
    differs = pc.and_(differs, pc.is_valid(listed["modified"].take(known)))
    repeats = pc.is_in(keys(planned.take(before)), keys(again)) if again else pa.scalar(False)
    anew = pc.or_(differs, repeats)
    revisions = pc.add(planned["revision"].take(before.filter(anew)), 1)
    chosen = np.zeros(listed.num_rows, bool)
    chosen[known.filter(anew).to_numpy()] = True
    changed = _with_revision(picked(listed, pa.array(chosen)), revisions)  # `take` would copy all names, if of none
    present = np.zeros(planned.num_rows, bool)
    present[where.filter(pc.is_valid(listed["modified"])).drop_null().to_numpy()] = True
    gone = pc.and_(pc.is_valid(planned["modified"]), pa.array(~present))
    fresh = pa.concat_tables([new, changed])
    if fresh.num_rows:
        earlier = read_plan(run_dir, ["shard_id"])["shard_id"]
        shards = cut_shards(fresh, first_index=1 + int(earlier[-1].as_py()) if len(earlier) else 0)
        _write_generation(Path(run_dir) / "plan", shards.table)
    differing_count, gone_count = (pc.sum(mask).as_py() or 0 for mask in (differs, gone))
    return PlanChanges(new.num_rows, differing_count, changed.num_rows - differing_count, gone_count)


def load_plan(run_dir: Path | str) -> Shards:
    """All shards of a run with the latest revision of each image; empty before the first `update_plan`.

    Raises PlanError for a damaged plan.
    """
    return Shards(latest_revisions(read_plan(run_dir)))


def latest_revisions(planned: pa.Table) -> pa.Table:
    """The rows that no later one supersedes; a revision above the first one does."""
    if not pc.any(pc.greater(planned["revision"], 0)).as_py():
        return planned
    codes = planned["image_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    last = np.empty(codes.max() + 1, dtype=np.int64)
    last[codes] = np.arange(len(codes))
    return picked(planned, pa.array(last[codes] == np.arange(len(codes))))


def picked(table: pa.Table, mask: pa.Array) -> pa.Table:
    """The rows that a mask picks; the table itself, and no copy, if that is all."""
    return table if pc.all(mask).as_py() else table.filter(mask)


def _places(wanted: pa.ChunkedArray, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where in `values` each one that is wanted stands; null: nowhere."""
    if wanted.equals(values):  # nothing has changed, which is told without an index of all of them
        return pa.chunked_array([pa.array(np.arange(len(values), dtype=np.int32))])
    return pc.index_in(wanted, values)


def _with_revision(table: pa.Table, revision: int | pa.ChunkedArray) -> pa.Table:
    if isinstance(revision, int):
        revision = pa.array(np.full(table.num_rows, revision, dtype=np.int64))
    return table.append_column("revision", revision)


def keys(table: pa.Table) -> pa.ChunkedArray:
    """What an image and its revision are told by."""
    return pc.binary_join_element_wise(table["image_id"], pc.cast(table["revision"], pa.string()), ":")


def _generations(folder: Path) -> list[Path]:
    return [path for path in parquet_files(folder) if path.stem.isdigit()]


def read_plan(run_dir: Path | str, columns: list[str] = PLAN_SCHEMA.names) -> pa.Table:
    """Every row ever planned, in order, superseded revisions included."""
    tables = [PLAN_SCHEMA.empty_table().select(columns)]
    for path in _generations(Path(run_dir) / "plan"):
        try:
            # pyarrow takes no path that is not UTF-8
            with path.open("rb") as data, pq.ParquetFile(data, page_checksum_verification=True) as file:
                schema = file.schema_arrow.remove_metadata()
                table = _read(file, columns) if schema.equals(PLAN_SCHEMA) else None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} cannot be read as a plan ({error}); start again with a new OUT") from error
        if table is None:
            raise PlanError(f"{path} has columns {schema.names}, expected {PLAN_SCHEMA.names}")
        if without := [name for name in ("shard_id", "image_id") if name in columns and table[name].null_count]:
            raise PlanError(f"{path} has rows without {' and '.join(without)}; start again with a new OUT")
        tables.append(table)
    return pa.concat_tables(tables)


def _read(file: pq.ParquetFile, columns: list[str]) -> pa.Table:
    """Some columns of a file, one part after the other: Arrow would read all at once, with as much memory again."""
    parts = [file.read_row_group(i, columns, use_threads=False) for i in range(file.num_row_groups)]
    return pa.concat_tables(parts).replace_schema_metadata(None)


def _write_generation(folder: Path, table: pa.Table) -> None:
    """Adds the next file of the plan: whole and durable, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    existing = _generations(folder)
    number = int(existing[-1].stem) + 1 if existing else 0
    path = folder / f"{number:05d}.parquet"
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            options = {"row_group_size": _ROW_GROUP_ROWS, "write_page_checksum": True}
            pq.write_table(table, file, compression="zstd", **options)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A link, unlike a rename, refuses to replace a generation that another driver has written meanwhile.
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            temporary.rename(path)  # the lock of the one driver has to do
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
