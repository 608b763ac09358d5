"""What counts as an image of a source, and what becomes of odd files."""

import csv
import os
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import source
from pipeline.images import ImageFault
from pipeline.records import Stage, image_id, to_refs
from pipeline.source import SourceError, fetch, list_source, local_path


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def paths(listing):
    return [image.relative_path for image in to_refs(listing.table)]


def test_candidates_are_found_by_extension_at_any_depth(tmp_path):
    fill(
        tmp_path,
        "b.JPG",
        "a/z.tiff",
        "a/deep/er/x.webp",
        "notes.txt",
        "a/Thumbs.db",
        ".hidden/p.png",
        "noextension",
        "g.gif",
        "saved by a browser.jfif",
    )
    listing = list_source(tmp_path)
    assert paths(listing) == [".hidden/p.png", "a/deep/er/x.webp", "a/z.tiff", "b.JPG", "saved by a browser.jfif"]
    assert listing.ignored == 4
    assert listing.unreadable_directories == ()


def test_refs_hold_id_size_and_time(tmp_path):
    fill(tmp_path, "a/photo.png")
    os.utime(tmp_path / "a/photo.png", ns=(0, 1_700_000_000_123_456_789))
    (ref,) = to_refs(list_source(tmp_path).table)
    assert ref.image_id == image_id("a/photo.png")
    assert ref.size_bytes == len("a/photo.png")
    assert ref.modified == datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)
    assert ref.revision == 0
    assert fetch(ref) == b"a/photo.png"


def test_order_is_that_of_relative_paths_and_does_not_depend_on_the_source_place(tmp_path):
    names = ["b/1.png", "a.png", "a/2.png", "a-b.png", "B.png"]
    for place in ("one", "two"):
        fill(tmp_path / place, *(names if place == "one" else names[::-1]))
    one, two = list_source(tmp_path / "one"), list_source(tmp_path / "two")
    assert paths(one) == paths(two) == sorted(names)
    assert [i.image_id for i in to_refs(one.table)] == [i.image_id for i in to_refs(two.table)]


def test_links_to_files_count_and_links_to_folders_are_not_followed(tmp_path):
    fill(tmp_path / "src", "real/a.png")
    fill(tmp_path, "elsewhere/b.png")
    (tmp_path / "src/link.png").symlink_to(tmp_path / "elsewhere/b.png")
    (tmp_path / "src/real/loop").symlink_to(tmp_path / "src")
    (tmp_path / "src/folder.png").symlink_to(tmp_path / "elsewhere")
    listing = list_source(tmp_path / "src")
    assert paths(listing) == ["link.png", "real/a.png"]
    assert listing.ignored == 2
    assert fetch(to_refs(listing.table)[0]) == b"elsewhere/b.png"


def test_what_is_no_regular_file_is_ignored(tmp_path):
    fill(tmp_path, "a.png", "folder.png/inner.png")
    os.mkfifo(tmp_path / "pipe.png")
    listing = list_source(tmp_path)
    assert paths(listing) == ["a.png", "folder.png/inner.png"]
    assert listing.ignored == 1


def test_broken_link_stays_a_candidate_and_fails_when_fetched(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (ref,) = to_refs(list_source(tmp_path).table)
    assert (ref.size_bytes, ref.modified) == (0, None)
    with pytest.raises(ImageFault) as caught:
        fetch(ref)
    assert (caught.value.stage, caught.value.error_class) == (Stage.FETCH, "missing")


def test_file_that_cannot_be_read_is_a_fault_with_its_cause(tmp_path):
    fill(tmp_path, "a.png")
    (ref,) = to_refs(list_source(tmp_path).table)
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ImageFault, match="not a regular file") as caught:
        fetch(ref)
    assert caught.value.error_class == "unreadable"


@pytest.mark.parametrize("name", [b"caf\xe9.png", "caf\u00e9 100% ?#;.png".encode(), b"new\nline.png", b"a\\b.png"])
def test_any_name_is_listed_in_valid_utf8_and_can_be_fetched(tmp_path, name):
    try:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"content")
    except OSError:
        pytest.skip("this file system refuses the name")
    (ref,) = to_refs(list_source(tmp_path).table)
    assert ref.relative_path == ("caf%E9.png" if name == b"caf\xe9.png" else name.decode())
    assert ref.image_id == image_id(os.fsdecode(name))
    assert os.fsencode(local_path(ref.uri).name) == name
    assert fetch(ref) == b"content"


def test_replaced_bytes_do_not_take_the_name_of_another_file(tmp_path):
    root = os.fsencode(tmp_path)
    for name in (b"caf%E9.png", b"caf\xe9.png"):
        try:
            with open(os.path.join(root, name), "wb") as file:
                file.write(name)
        except OSError:
            pytest.skip("this file system refuses the name")
    listing = list_source(tmp_path)
    assert len(set(paths(listing))) == 2
    by_path = {image.relative_path: fetch(image) for image in to_refs(listing.table)}
    assert by_path.pop("caf%E9.png") == b"caf%E9.png"
    assert list(by_path.values()) == [b"caf\xe9.png"]


def test_unusable_sources_say_what_to_do(tmp_path):
    with pytest.raises(SourceError, match="does not exist; check the path"):
        list_source(tmp_path / "missing")
    fill(tmp_path, "one.png", "empty/notes.txt")
    with pytest.raises(SourceError, match="not a directory"):
        list_source(tmp_path / "one.png")
    with pytest.raises(SourceError, match=r"no images in .*\(1 other files\); expected files .*\.jpeg"):
        list_source(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_folder_without_permission_is_named(tmp_path):
    fill(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    try:
        listing = list_source(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert paths(listing) == ["a.png"]
    assert listing.unreadable_directories == ("closed",)


def test_line_breaks_inside_quotes_end_no_row_of_a_large_list(tmp_path):
    """Arrow reads a list in blocks of a mebibyte."""
    rows = [(f"{number:05}.png", f"A photograph.\nSecond line, of {number:05}") for number in range(30_000)]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    assert (tmp_path / "list.csv").stat().st_size > 2**20
    listing = list_source(tmp_path / "list.csv")
    assert listing.table["relative_path"].to_pylist() == [name for name, _ in rows]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_a_list_names_files_wherever_they_are(tmp_path, suffix):
    fill(tmp_path, "lists/a.png", "lists/deep/b.odd", "elsewhere/c, d.png")
    names = [
        "deep/b.odd", "a.png", "gone.png", str(tmp_path / "lists/a.png"), "../elsewhere/c, d.png",
        "deep",
    ]  # fmt: skip
    path = tmp_path / "lists" / f"some{suffix}"
    if suffix == ".txt":
        path.write_text("\r\n".join(names) + "\n\n")
    elif suffix == ".csv":
        path.write_text("id,path\n" + "".join(f'{i},"{name}"\n' for i, name in enumerate(names)))
    else:
        pq.write_table(pa.table({"id": range(len(names)), "path": names}), path)
    listing = list_source(path)
    outside = str(tmp_path / "elsewhere/c, d.png").lstrip("/")
    assert paths(listing) == ["deep/b.odd", "a.png", "gone.png", outside, "deep"]
    assert listing.ignored == 1
    assert [i.size_bytes for i in to_refs(listing.table)] == [16, 11, 0, 18, 0]
    assert [i.modified is None for i in to_refs(listing.table)] == [False, False, True, False, True]
    assert [fetch(to_refs(listing.table)[i]) for i in (0, 3)] == [b"lists/deep/b.odd", b"elsewhere/c, d.png"]
    for index, fault in ((2, "missing"), (4, "unreadable")):
        with pytest.raises(ImageFault) as caught:
            fetch(to_refs(listing.table)[index])
        assert caught.value.error_class == fault


def test_a_list_may_name_files_by_way_of_a_link(tmp_path):
    """`find $PWD` under a linked home says the link's path; behind a link, `..` is where the target lies."""
    fill(tmp_path, "real/photos/a.png", "real/x.png", "x.png")
    (tmp_path / "home").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "far").symlink_to(tmp_path / "real" / "photos")
    path = tmp_path / "home" / "list.txt"
    path.write_text(
        f"{tmp_path}/home/photos/a.png\nphotos/a.png\n{tmp_path}/home/far/../x.png\nphotos/b..png\n/{tmp_path}/home/x.png\n"
    )
    listing = list_source(path)
    assert paths(listing) == ["photos/a.png", "x.png", "photos/b..png"]
    assert fetch(to_refs(listing.table)[1]) == b"real/x.png"
    assert listing.ignored == 2


def test_a_list_may_not_name_two_files_that_read_alike(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf%E9.png\ncaf\xe9.png\n")
    with pytest.raises(SourceError, match=r"two files whose results would have one name: .*caf%25E9.*caf%E9"):
        list_source(tmp_path / "list.txt")


def test_companions_of_macos_are_ignored(tmp_path):
    fill(tmp_path, "a.png", "._a.png", "deep/._b.jpg")
    listing = list_source(tmp_path)
    assert paths(listing) == ["a.png", "deep/._b.jpg"]
    assert listing.ignored == 1


def test_a_time_that_python_has_no_date_for_is_cut(tmp_path, monkeypatch):
    fill(tmp_path, "a.png")
    monkeypatch.setattr(source, "_LATEST", 1_000_000)
    assert to_refs(list_source(tmp_path).table)[0].modified == datetime.fromtimestamp(1, UTC)
    monkeypatch.undo()
    for limit, year in ((source._EARLIEST, 1), (source._LATEST, 9999)):
        assert (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=limit)).year == year


def test_a_listed_pipe_is_a_fault_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("pipe.png\n")
    (ref,) = to_refs(list_source(tmp_path / "list.txt").table)
    with pytest.raises(ImageFault, match="not a regular file"):
        fetch(ref)


def test_lists_that_cannot_be_used_say_why(tmp_path):
    fill(tmp_path, "a.png")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SourceError, match="names no file"):
        list_source(tmp_path / "empty.txt")
    (tmp_path / "other.csv").write_text("file\na.png\n")
    with pytest.raises(SourceError, match="path"):
        list_source(tmp_path / "other.csv")
    pq.write_table(pa.table({"file": ["a.png"]}), tmp_path / "other.parquet")
    with pytest.raises(SourceError, match="its columns are file"):
        list_source(tmp_path / "other.parquet")
    pq.write_table(pa.table({"path": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(SourceError, match="its column path holds int64"):
        list_source(tmp_path / "numbers.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(SourceError, match=r"broken\.parquet cannot be read"):
        list_source(tmp_path / "broken.parquet")
    (tmp_path / "two.txt").write_text("/x/a.png\nx/a.png\n")
    with pytest.raises(SourceError, match="one name"):
        list_source(tmp_path / "two.txt")


def test_only_file_uris_are_local():
    with pytest.raises(ValueError, match="s3://bucket"):
        local_path("s3://bucket/key.png")


def test_folders_in_folders_have_no_limit(tmp_path):
    folders = [tmp_path]
    for _ in range(1100):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    (folders[-1] / "a.png").write_bytes(b"1")
    try:
        assert paths(list_source(tmp_path)) == ["d/" * 1100 + "a.png"]
    finally:
        (folders[-1] / "a.png").unlink()
        for folder in reversed(folders[1:]):  # `shutil.rmtree` has a limit
            folder.rmdir()
