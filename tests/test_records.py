from dataclasses import MISSING, fields
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from classifier.labels import LABELS
from pipeline.records import MANIFEST_SCHEMA, SCHEMA_VERSION, Outcome, Stage, Status, image_id, to_table

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def smallest(**values):
    identity = {"image_id": "1f", "shard_id": "00000", "source_uri": "file:///a.png", "relative_path": "a.png"}
    run = {"run_id": "run", "config_digest": "digest", "code_version": "0"}
    return Outcome(**(identity | run | {"status": Status.FAILED} | values))


def filled():
    """A row without a null, each value of its column's type."""
    samples = {
        pa.string(): "text",
        pa.float64(): 0.1,
        pa.int64(): 2**40,
        pa.bool_(): True,
        pa.timestamp("us", tz="UTC"): NOW,
        pa.list_(pa.string()): ("one", "two"),
    }
    values = {field.name: samples.get(field.type) for field in MANIFEST_SCHEMA}
    values |= {"probabilities": {str(label): 0.125 for label in LABELS}, "stage": Stage.DECODE}
    return smallest(**(values | {"status": Status.RESTORED}))


def test_a_row_needs_only_what_every_outcome_has():
    required = {f.name for f in fields(Outcome) if f.default is MISSING and f.default_factory is MISSING}
    assert required == {
        "image_id", "shard_id", "source_uri", "relative_path", "status", "run_id", "config_digest", "code_version"
    }  # fmt: skip


def test_columns_of_nulls_keep_their_type(tmp_path):
    table = to_table([smallest()])
    assert table.schema.equals(MANIFEST_SCHEMA)
    pq.write_table(table, tmp_path / "part.parquet")
    again = pq.read_table(tmp_path / "part.parquet")
    assert again.schema.remove_metadata().equals(MANIFEST_SCHEMA)
    row = again.to_pylist()[0]
    assert (row["psnr_db"], row["probabilities"], row["warnings"], row["stage"]) == (None, None, [], None)
    assert (row["status"], row["revision"], row["schema_version"]) == ("failed", 0, SCHEMA_VERSION)


def test_full_and_empty_rows_survive_parquet_together(tmp_path):
    rows = [filled(), smallest(), filled()]
    pq.write_table(to_table(rows), tmp_path / "part.parquet")
    for row, read in zip(rows, pq.read_table(tmp_path / "part.parquet").to_pylist(), strict=True):
        for name in MANIFEST_SCHEMA.names:
            value = getattr(row, name)
            assert read[name] == (list(value) if name == "warnings" else value), name


def test_a_full_row_leaves_no_column_null():
    table = to_table([filled()])
    assert [name for name in table.column_names if table[name].null_count] == []


def test_no_rows_are_a_table_too():
    assert to_table([]).schema.equals(MANIFEST_SCHEMA)


@given(st.lists(st.text(st.characters(exclude_categories=()), min_size=1, max_size=30), unique=True, max_size=20))
def test_ids_are_stable_and_distinct(paths):
    valid = [path for path in paths if not any("\ud800" <= c <= "\udc7f" or "\udd00" <= c <= "\udfff" for c in path)]
    ids = [image_id(path) for path in valid]
    assert len(set(ids)) == len(ids)
    assert all(len(one) == 32 for one in ids)
    assert ids == [image_id(path) for path in valid]


def test_id_of_a_path_never_changes():
    assert image_id("a/photo.png") == "4314812285d1ce738407fc152098f0b9"
