import errno
import hashlib
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.image_records import ImageFault
from pipeline.records import MANIFEST_SCHEMA, Outcome, Stage, Status, image_id
from pipeline.sink import ManifestError, OtherRunError, RunDirectory, ShardBusyError, done, read_manifest


def row(name: str, *, shard: str = "s1", revision: int = 0, **facts: object) -> Outcome:
    return Outcome(
        image_id=image_id(name),
        shard_id=shard,
        source_uri=f"file:///{name}",
        relative_path=name,
        revision=revision,
        run_id="run",
        config_digest="digest",
        code_version="1",
        finished_at=datetime.now(UTC),
        **({"status": Status.RESTORED} | facts),  # type: ignore[arg-type]
    )


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "out")
    directory.create()
    return directory


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_image_is_there_whole_under_its_name_only(directory: RunDirectory) -> None:
    written = directory.write_image("a/b.png", b"pixels")
    assert written.path.read_bytes() == b"pixels"
    assert written.sha256 == hashlib.sha256(b"pixels").hexdigest()
    assert written.size_bytes == 6
    assert directory.uri(written.path) == "images/a/b.png"
    assert names(directory.images_dir) == ["a/b.png"]


def test_all_that_a_row_speaks_of_outlives_a_power_cut(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not synced before the part has its name may be lost while the row stays."""
    happened: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def is_final(path: str) -> str:
        name = Path(path).relative_to(directory.root).as_posix()
        return "part" if name.endswith(".parquet") else name

    def noted_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        happened.append(("sync", "contents" if path.endswith(".partial") else is_final(path)))
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        rename(source, target)
        happened.append(("rename", is_final(str(target))))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_rename)
    directory.write_image("a/b/c.png", b"pixels")
    directory.commit_part("s1", [row("a/b/c.png", output_uri="images/a/b/c.png")])
    image, part = happened.index(("rename", "images/a/b/c.png")), happened.index(("rename", "part"))
    assert happened[image - 1] == happened[part - 1] == ("sync", "contents")
    folders = [("sync", name) for name in ("images", "images/a", "images/a/b")]
    assert sorted(happened[image + 1 : part - 1]) == folders
    assert happened[part + 1 :] == [("sync", "manifest")]
    happened.clear()
    directory.write_json(directory.job_path, {})
    assert happened[-2:] == [("rename", "job.json"), ("sync", ".")]


def test_a_name_as_long_as_a_file_system_allows_can_be_written(directory: RunDirectory) -> None:
    name = "ü" * 125 + ".png"
    assert directory.write_image(name, b"x").path.name == name


@pytest.mark.parametrize("path", ["../a.png", "/a.png", "a/../../b.png", ""])
def test_nothing_is_written_outside_the_images_folder(directory: RunDirectory, path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside"):
        directory.write_image(path, b"x")


@pytest.mark.parametrize("by_link", [False, True])
def test_no_photograph_is_replaced_where_a_folder_of_results_is_a_link_to_it(
    directory: RunDirectory, tmp_path: Path, by_link: bool
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "other.png").write_bytes(b"other")
    (tmp_path / "source" / "a.png").write_bytes(b"photograph")
    (directory.images_dir / "sub").symlink_to(tmp_path / "source")
    for name in ("sub/a.png", "sub/new/a.png"):
        with pytest.raises(ImageFault, match="leads out of images/: images/sub") as caught:
            directory.link_image(name, tmp_path / "other.png", b"other") if by_link else directory.write_image(
                name, b""
            )
        assert caught.value.error_class == "linked_folder"
    assert names(tmp_path / "source") == ["a.png"]
    assert (tmp_path / "source" / "a.png").read_bytes() == b"photograph"


def test_the_images_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """To a larger disk, for instance."""
    (tmp_path / "out").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "out" / "images").symlink_to(tmp_path / "disk")
    directory = RunDirectory(tmp_path / "out")
    directory.create()
    directory.write_image("a/b.png", b"pixels")
    assert names(tmp_path / "disk") == ["a/b.png"]


def test_a_folder_without_a_run_has_no_manifest(directory: RunDirectory) -> None:
    for folder in (directory.manifest_dir, directory.root / "no-such-folder"):
        with pytest.raises(ManifestError, match="holds no run"):
            read_manifest(folder)


def test_a_failed_write_leaves_no_file(directory: RunDirectory) -> None:
    (directory.images_dir / "a.png").mkdir()
    with pytest.raises(OSError, match="directory"):
        directory.write_image("a.png", b"x")
    assert names(directory.images_dir) == []


def test_a_link_shares_the_source_and_a_rewrite_leaves_the_source_alone(
    directory: RunDirectory, tmp_path: Path
) -> None:
    source = tmp_path / "source.png"
    source.write_bytes(b"original")
    for _ in range(2):
        written = directory.link_image("a.png", source, b"original")
        assert os.path.samefile(written.path, source)
        assert written.sha256 == hashlib.sha256(b"original").hexdigest()
        assert names(directory.images_dir) == ["a.png"]
    directory.write_image("a.png", b"restored")
    assert source.read_bytes() == b"original"


def test_a_file_that_changed_since_it_was_read_is_not_linked(directory: RunDirectory, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    source.write_bytes(b"replaced")
    with pytest.raises(ImageFault) as caught:
        directory.link_image("a.png", source, b"original")
    assert (caught.value.stage, caught.value.error_class) == (Stage.WRITE, "source_changed")
    assert names(directory.images_dir) == []


@pytest.mark.parametrize(
    ("number", "is_of_image"),
    [(errno.EPERM, True), (errno.EXDEV, True), (errno.EMLINK, True), (errno.EACCES, False), (errno.ENOSPC, False)],
)
def test_a_file_that_alone_cannot_be_linked_is_told_from_a_folder_in_which_none_can(
    directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_of_image: bool
) -> None:
    """As Linux refuses a link to somebody else's file."""
    source = tmp_path / "source.png"
    source.write_bytes(b"original")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ImageFault if is_of_image else OSError, match=os.strerror(number)) as caught:
        directory.link_image("a.png", source, b"original")
    if is_of_image:
        assert (caught.value.stage, caught.value.error_class) == (Stage.WRITE, "not_linkable")


def test_rows_come_back_as_they_were_committed(directory: RunDirectory) -> None:
    rows = [row("b", probabilities={"noise": 0.5}, warnings=("w",), stage="decode"), row("a", status=Status.FAILED)]
    directory.commit_part("s1", rows)
    assert directory.rows("s1") == [
        Outcome(**{**vars(each), "probabilities": _whole(each.probabilities)}) for each in rows
    ]
    table = read_manifest(directory.root)
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert table["relative_path"].to_pylist() == ["a", "b"]


def _whole(probabilities: dict[str, float] | None) -> dict[str, float | None] | None:
    labels = [field.name for field in MANIFEST_SCHEMA.field("probabilities").type]
    return None if probabilities is None else {label: probabilities.get(label) for label in labels}


def test_a_part_states_its_run(directory: RunDirectory) -> None:
    part = directory.commit_part("s1", [row("a")])
    metadata = pq.read_schema(part).metadata
    assert metadata[b"dfpir.run_id"] == b"run"
    assert metadata[b"dfpir.config_digest"] == b"digest"
    assert metadata[b"dfpir.code_version"] == b"1"
    assert metadata[b"dfpir.schema_version"] == b"1"


def test_parts_never_overwrite_each_other(directory: RunDirectory) -> None:
    parts = {directory.commit_part("s1", [row(f"{number}")]) for number in range(20)}
    assert len(parts) == 20
    assert read_manifest(directory.root).num_rows == 20


def test_a_shard_knows_its_own_rows_only(directory: RunDirectory) -> None:
    directory.commit_part("s1", [row("a")])
    directory.commit_part("s1-2", [row("b", shard="s1-2", revision=3)])
    assert directory.committed("s1") == {(image_id("a"), 0)}
    assert directory.committed("s1-2") == {(image_id("b"), 3)}
    assert sorted(done(directory.root)["revision"].to_pylist()) == [0, 3]


def test_the_manifest_has_the_highest_revision_of_each_image(directory: RunDirectory) -> None:
    directory.commit_part("s2", [row("a", revision=1, shard="s2"), row("b")])
    directory.commit_part("s1", [row("a", status=Status.FAILED)])
    table = read_manifest(directory.root)
    assert table.select(["relative_path", "revision"]).to_pylist() == [
        {"relative_path": "a", "revision": 1},
        {"relative_path": "b", "revision": 0},
    ]


def test_an_empty_run_has_an_empty_manifest(directory: RunDirectory) -> None:
    assert read_manifest(directory.root).schema.equals(MANIFEST_SCHEMA)
    assert read_manifest(directory.root).num_rows == 0


def test_a_half_written_part_is_not_read_and_is_removed(directory: RunDirectory) -> None:
    part = directory.commit_part("s1", [row("a")])
    whole = part.read_bytes()
    (directory.manifest_dir / ".s1-00.parquet.0123456789abcdef.partial").write_bytes(whole[: len(whole) // 2])
    directory.write_image("deep/a.png", b"x")
    (directory.images_dir / "deep" / ".a.png.0123456789abcdef.partial").write_bytes(b"")
    assert read_manifest(directory.root).num_rows == 1
    assert directory.remove_partials() == 2
    assert names(directory.manifest_dir) == [part.name]
    assert names(directory.images_dir) == ["deep/a.png"]


def test_what_only_looks_half_written_stays(directory: RunDirectory) -> None:
    directory.write_image(".foo.partial", b"x")
    directory.write_image(".cache.partial/a.png", b"x")
    directory.write_image(".cache.0123456789abcdef.partial/a.png", b"x")
    assert directory.remove_partials() == 0
    assert len(names(directory.images_dir)) == 3


def test_a_folder_whose_name_is_no_text_holds_a_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / os.fsdecode(b"o\xff"))
    directory.create()
    directory.commit_part("s1", [row("a")])
    assert read_manifest(directory.root).num_rows == 1


def test_a_damaged_part_is_named(directory: RunDirectory) -> None:
    part = directory.commit_part("s1", [row("a")])
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(ManifestError, match=part.name):
        read_manifest(directory.root)


def test_a_part_with_a_row_of_no_image_is_named(directory: RunDirectory) -> None:
    part = directory.commit_part("s1", [replace(row("a"), image_id=None)])  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match=f"{part.name} has rows without image_id"):
        read_manifest(directory.root)


def test_a_part_of_another_schema_is_named_with_its_columns(directory: RunDirectory) -> None:
    pq.write_table(pa.table({"image_id": ["a"], "revision": [0]}), directory.manifest_dir / "s1-0.parquet")
    with pytest.raises(ManifestError, match=r"s1-0\.parquet.*shard_id"):
        done(directory.root)


HOLDER = """
import sys, time
from pipeline.sink import RunDirectory
with RunDirectory(sys.argv[1]).shard_lock("s1"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_shard_is_held_until_its_process_is_killed(directory: RunDirectory) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(directory.root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ShardBusyError, match="s1"), directory.shard_lock("s1", wait_s=0):
            pass
        with pytest.raises(ShardBusyError):
            directory.await_workers(wait_s=0)
        with directory.shard_lock("s2", wait_s=0):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with directory.shard_lock("s1"):
        pass
    directory.await_workers(wait_s=0)


def test_json_is_replaced_whole(directory: RunDirectory) -> None:
    directory.write_json(directory.job_path, {"a": 1})
    directory.write_json(directory.job_path, {"a": "ü"})
    assert directory.job_path.read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'
    assert [path.name for path in directory.root.iterdir() if path.is_file()] == ["job.json"]


def test_a_link_in_a_new_folder_to_a_symbolic_link_is_the_file_itself(directory: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(b"original")
    link = tmp_path / "link.png"
    link.symlink_to("elsewhere.png")
    written = directory.link_image("deep/er/a.png", link, b"original")
    assert not written.path.is_symlink()
    assert os.path.samefile(written.path, tmp_path / "elsewhere.png")


def test_what_is_done_tells_status_and_results_of_another_name(directory: RunDirectory) -> None:
    kept = row("a.png", output_uri="images/a.png")
    renamed = row("b.jpg", output_uri="images/b.jpg.png", revision=2)
    directory.commit_part("s1", [kept, row("c.png", status=Status.FAILED)])
    directory.commit_part("s2", [renamed])
    found = {each["image_id"]: each for each in done(directory.root).to_pylist()}
    assert {each["status"] for each in found.values()} == {"restored", "failed"}
    assert {key: each["renamed"] for key, each in found.items()} == {
        kept.image_id: None, row("c.png").image_id: None, renamed.image_id: "b.jpg.png",
    }  # fmt: skip
    assert found[renamed.image_id]["revision"] == 2


def test_another_runs_folder_is_told_from_ones_own(directory: RunDirectory) -> None:
    with pytest.raises(OtherRunError, match=r"job\.json cannot be read"):
        directory.require_run("mine")
    directory.write_json(directory.job_path, {"run_id": "mine"})
    directory.require_run("mine")
    with pytest.raises(OtherRunError, match="is of run mine"):
        directory.require_run("other")


@pytest.mark.parametrize("folds", [str.casefold, lambda name: unicodedata.normalize("NFC", name)])
def test_a_file_system_that_folds_names_is_found_out(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, folds: Callable[[str], str]
) -> None:
    assert not directory.folds_names()
    there = Path.exists

    def exists(path: Path) -> bool:
        return there(path) or folds(path.name) in map(folds, os.listdir(path.parent))

    monkeypatch.setattr(Path, "exists", exists)
    assert directory.folds_names()
    assert not [path for path in directory.root.iterdir() if path.is_file()]


def test_names_are_tried_where_the_locale_has_no_accents(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from pipeline.sink import RunDirectory as Run"
    script += "; assert not Run(Path(sys.argv[1])).folds_names()"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ | locale, check=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_is_not_made_anew(directory: RunDirectory, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    source.write_bytes(b"x")
    directory.root.rename(tmp_path / "moved")
    works: list[Callable[[], object]] = [
        lambda: directory.write_image("a.png", b"x"),
        lambda: directory.link_image("a.png", source, b"x"),
        lambda: directory.commit_part("s000", [row("a.png")]),
        lambda: directory.shard_lock("s000").__enter__(),
    ]
    for work in works:
        with pytest.raises(OtherRunError, match="not there any more"):
            work()
    assert not directory.root.exists()
