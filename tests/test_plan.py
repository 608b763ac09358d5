"""The plan: every image in exactly one shard, frozen, and brought up to date by new generations only."""

import os
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import plan
from pipeline.plan import PLAN_SCHEMA, PlanChanges, PlanError, Shards, cut_shards, load_plan, update_plan
from pipeline.records import IMAGE_REF_SCHEMA, ImageRef, image_id, to_refs
from pipeline.source import LISTING_SCHEMA, Listing, list_source

NOON = datetime(2026, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)


def ref(name, size_bytes=1000, modified=NOON):
    return ImageRef(image_id(name), name, f"file:///src/{name}", size_bytes, modified)


def table(refs):
    return pa.Table.from_pylist([asdict(ref) for ref in refs], schema=IMAGE_REF_SCHEMA)


def listing(*refs):
    return Listing(table(sorted(refs, key=lambda r: r.relative_path)).select(LISTING_SCHEMA.names), 0)


def images(shards):
    return [image for shard in shards for image in shard.images]


def added(run_dir):
    """The newest generation's shards."""
    return Shards(pq.read_table(sorted((run_dir / "plan").iterdir())[-1]))


@settings(deadline=None)
@given(st.lists(st.integers(0, 100 * 2**20), max_size=300))
def test_shards_hold_every_image_once_and_keep_their_limits(sizes):
    refs = [ref(f"{i:04d}.png", size) for i, size in enumerate(sizes)]
    shards = cut_shards(table(refs))
    assert images(shards) == refs
    assert [shard.shard_id for shard in shards] == [f"{i:05d}" for i in range(len(shards))]
    for shard in shards:
        assert 1 <= len(shard.images) <= 64
        assert len(shard.images) == 1 or sum(i.size_bytes for i in shard.images) <= 64 * 2**20


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (4, 1), (9, 3), (32, 8), (100, 8), (512, 8), (640, 10)])
def test_small_jobs_give_several_workers_something_to_do(count, shards):
    assert len(cut_shards(table([ref(f"{i:04d}.png") for i in range(count)]))) == shards


@pytest.mark.parametrize(("count", "shards"), [(32_768, 512), (65_536, 512), (262_144, 1024)])
def test_large_jobs_have_larger_shards(count: int, shards: int) -> None:
    one = table([ref("a.png", 1000)])
    cut = cut_shards(pa.concat_tables([one] * count))
    assert len(cut) == shards
    assert len(cut[0].images) == count // shards


def test_plan_is_read_back_as_it_was_written(tmp_path):
    refs = [ref("a.png"), ref("b \u00e9.png", size_bytes=0, modified=None), ref("c/d.png")]
    changes = update_plan(tmp_path, listing(*refs))
    assert (changes.new, changes.changed, changes.vanished) == (3, 0, 0)
    assert list(load_plan(tmp_path)) == list(added(tmp_path))
    assert images(load_plan(tmp_path)) == to_refs(listing(*refs).table)
    (path,) = (tmp_path / "plan").iterdir()
    assert path.name == "00000.parquet"
    assert pq.read_schema(path).equals(PLAN_SCHEMA)


def test_no_plan_is_an_empty_plan(tmp_path):
    assert list(load_plan(tmp_path)) == []


def test_second_call_without_changes_writes_nothing(tmp_path):
    update_plan(tmp_path, listing(ref("a.png"), ref("b.png", modified=None)))
    before = list(load_plan(tmp_path))
    changes = update_plan(tmp_path, listing(ref("a.png"), ref("b.png", modified=None)))
    assert changes == PlanChanges(0, 0, 0, 0)
    assert list(load_plan(tmp_path)) == before
    assert len(list((tmp_path / "plan").iterdir())) == 1


def test_new_files_get_new_shards_and_old_shards_stay(tmp_path):
    update_plan(tmp_path, listing(ref("b.png"), ref("c.png")))
    first = added(tmp_path)
    frozen = (tmp_path / "plan/00000.parquet").read_bytes()
    second = update_plan(tmp_path, listing(ref("a.png"), ref("b.png"), ref("c.png")))
    assert (second.new, second.changed) == (1, 0)
    assert [shard.shard_id for shard in added(tmp_path)] == ["00001"]
    assert list(load_plan(tmp_path)) == [*first, *added(tmp_path)]
    assert (tmp_path / "plan/00000.parquet").read_bytes() == frozen


@pytest.mark.parametrize("change", [{"size_bytes": 1001}, {"modified": NOON + timedelta(microseconds=1)}])
def test_changed_files_become_a_new_revision_that_supersedes_the_old(tmp_path, change):
    update_plan(tmp_path, listing(ref("a.png"), ref("b.png")))
    changed = replace(ref("a.png"), **change)
    for revision in (1, 2):
        changes = update_plan(tmp_path, listing(changed, ref("b.png")))
        assert (changes.new, changes.changed) == (0, 1)
        assert images(added(tmp_path)) == [replace(changed, revision=revision)]
        planned = images(load_plan(tmp_path))
        assert sorted(i.relative_path for i in planned) == ["a.png", "b.png"]
        assert replace(changed, revision=revision) in planned
        changed = replace(changed, size_bytes=changed.size_bytes + 5)


def test_shard_of_superseded_images_alone_disappears(tmp_path):
    update_plan(tmp_path, listing(ref("a.png")))
    update_plan(tmp_path, listing(ref("a.png", size_bytes=7)))
    assert [shard.shard_id for shard in load_plan(tmp_path)] == ["00001"]


@pytest.mark.parametrize(
    ("count", "size", "shards"),
    [(1_000, 30 * 2**20, 500), (4_000, 30 * 2**20, 572), (20_000, 30 * 2**20, 589), (4_000, 2**31, 4_000)],
)
def test_shards_of_large_images_grow_with_the_job(count, size, shards):
    one = table([ref("a.png", size_bytes=size)])
    assert len(cut_shards(pa.concat_tables([one] * count))) == shards


def test_vanished_files_are_reported_and_stay_planned(tmp_path):
    update_plan(tmp_path, listing(ref("a.png"), ref("b.png"), ref("c.png")))
    gone = replace(ref("c.png"), size_bytes=0, modified=None)
    changes = update_plan(tmp_path, listing(ref("b.png"), gone))
    assert changes == PlanChanges(0, 0, 0, 2)
    assert len(images(load_plan(tmp_path))) == 3
    back = update_plan(tmp_path, listing(ref("a.png"), ref("b.png"), ref("c.png")))
    assert (back.new, back.changed, back.vanished) == (0, 0, 0)


def test_images_that_are_not_seen_lose_their_time_alone(tmp_path):
    update_plan(tmp_path, listing(ref("a.png"), ref("b.png"), ref("c.png")))
    shards = load_plan(tmp_path)
    before, after = images(shards), images(shards.seen(pa.array([ref("b.png").image_id])))
    assert after == [replace(before[0], modified=None), before[1], replace(before[2], modified=None)]


def test_a_broken_link_that_is_mended_is_done_again(tmp_path):
    update_plan(tmp_path, listing(ref("a.png", size_bytes=0, modified=None)))
    changes = update_plan(tmp_path, listing(ref("a.png")))
    assert changes.changed == 1
    assert images(load_plan(tmp_path)) == [replace(ref("a.png"), revision=1)]


def test_interrupted_write_leaves_no_generation(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(plan.os, "fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            update_plan(tmp_path, listing(ref("a.png")))
    assert list((tmp_path / "plan").iterdir()) == []
    update_plan(tmp_path, listing(ref("a.png")))
    assert len(images(load_plan(tmp_path))) == 1


def test_damaged_and_foreign_plans_are_named(tmp_path):
    update_plan(tmp_path, listing(ref("a.png")))
    path = tmp_path / "plan/00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PlanError, match=r"00000\.parquet"):
        load_plan(tmp_path)
    path.write_bytes(whole)
    for name in ("image_id", "shard_id"):
        table = pq.read_table(path)
        place = PLAN_SCHEMA.get_field_index(name)
        broken = table.set_column(place, PLAN_SCHEMA.field(name), pa.nulls(1, pa.string()))
        pq.write_table(broken, path)
        with pytest.raises(PlanError, match=f"rows without {name}"):
            load_plan(tmp_path)
        path.write_bytes(whole)
    pq.write_table(PLAN_SCHEMA.empty_table().drop_columns(["uri"]), path)
    with pytest.raises(PlanError, match="expected"):
        load_plan(tmp_path)


def test_plan_of_a_real_folder_follows_its_changes(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    for name in ("a.png", "b.png"):
        (source / name).write_bytes(b"1")
    update_plan(tmp_path / "out", list_source(source))
    assert update_plan(tmp_path / "out", list_source(source)) == PlanChanges(0, 0, 0, 0)
    (source / "a.png").write_bytes(b"22")
    os.utime(source / "b.png", ns=(0, 1_600_000_000_000_000_000))
    (source / "c.png").write_bytes(b"3")
    changes = update_plan(tmp_path / "out", list_source(source))
    assert (changes.new, changes.changed) == (1, 2)


def test_a_new_file_that_reads_like_a_planned_one_is_refused(tmp_path):
    def named(identity):
        return ImageRef(identity, "a%FF.jpg", "file:///src/a", 1000, NOON)

    update_plan(tmp_path, listing(named("0" * 32), ref("b.jpg")))
    with pytest.raises(PlanError, match=r"a%FF\.jpg is the name of two images"):
        update_plan(tmp_path, listing(named("0" * 32), named("1" * 32)))
    assert load_plan(tmp_path).image_count == 2


def test_shards_are_a_sequence_that_can_be_cut_and_left_over(tmp_path):
    shards = cut_shards(table([ref(f"{i:02d}.png") for i in range(20)]))
    assert (len(shards), shards.image_count) == (5, 20)
    assert [shard.shard_id for shard in shards[1:3]] == ["00001", "00002"]
    assert shards[-1] == list(shards)[4]
    with pytest.raises(IndexError):
        shards[5]
    assert len(shards[:0]) == 0
    kept = [image for shard in shards for image in shard.images][5:9]
    done = shards.table.filter(pa.compute.invert(pa.compute.is_in(
        shards.table["image_id"], pa.array([image.image_id for image in kept])
    ))).select(["image_id", "revision"])  # fmt: skip
    left = shards.without(done)
    assert images(left) == kept
    assert [shard.shard_id for shard in left] == ["00001", "00002"]
    another_revision = done.set_column(1, "revision", pa.array([1] * len(done)))
    assert shards.without(another_revision).image_count == 20


def test_a_limit_leaves_out_what_lies_behind_it_but_nothing_planned(tmp_path):
    names = [f"{i}.png" for i in range(4)]
    update_plan(tmp_path, listing(ref("3.png")))
    changes = update_plan(tmp_path, listing(*map(ref, names)), limit=2)
    assert [i.relative_path for i in images(added(tmp_path))] == ["0.png", "1.png"]
    assert (changes.new, changes.vanished) == (2, 0)
    assert update_plan(tmp_path, listing(*map(ref, names)), limit=3).new == 1
