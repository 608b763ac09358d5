import errno
import os
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from jobs.errors import UsageError
from jobs.pack_photographs import main, pack
from jobs.training_data import Photographs

Refuses = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photographs"
    place.mkdir()
    for number in range(30):
        Image.fromarray(np.roll(data.coffee(), 20 * number, axis=1)[:300, :330]).save(place / f"photo-{number}.png")
    (place / "notes.txt").write_text("none")
    return place


def test_a_name_that_a_zip_file_cannot_hold_is_told(folder: Path, tmp_path: Path, refuses: Refuses) -> None:
    (folder / "photo-0.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    with refuses(r"a zip file holds no such name: 'caf\\udce9\.png' is not UTF-8"):
        main([str(folder), str(tmp_path / "packed.zip")])


def test_a_packed_folder_fits_and_is_what_it_was(folder: Path, tmp_path: Path) -> None:
    target, unpacked = tmp_path / "packed.zip", tmp_path / "unpacked"
    main([str(folder), str(target), "--megabytes", "1.5"])
    assert target.stat().st_size <= 1.5e6
    zipfile.ZipFile(target).extractall(unpacked)
    for validation in (False, True):
        before, after = (Photographs.clean([place]).part(validation=validation) for place in (folder, unpacked))
        assert before.names == after.names
        for (one,), (other,) in zip(before.scenes, after.scenes, strict=True):
            assert one.shape == other.shape
            assert np.abs(one.astype(float) - other).mean() < 4


def test_photographs_come_into_the_folders_that_a_table_names(folder: Path, tmp_path: Path, refuses: Refuses) -> None:
    target, table = tmp_path / "packed.zip", tmp_path / "folders.tsv"
    command = [str(folder), str(target), "--folders", str(table)]
    table.write_text("file\tfolder\nphoto-3.png\thazy\nphoto-5.png\tdrawings\n")
    main(command)
    names = set(zipfile.ZipFile(target).namelist())
    assert {name for name in names if not name.startswith("photographs/")} == {
        "hazy/photo-3.png",
        "drawings/photo-5.png",
    }
    assert len(names) == 30
    for content, said in (
        ("file\tfolder\nnone.png\thazy\n", r"1 are not in .*, none\.png among them"),
        ("file\tfolder\nphoto-3.png\t../hazy\n", r"'\.\./hazy' is no name of a folder"),
        ("file,folder\nphoto-3.png,hazy\n", "is no table with the columns file and folder"),
    ):
        table.write_text(content)
        with refuses(said):
            main(command)


def test_the_quality_falls_with_the_room_until_there_is_none(folder: Path, tmp_path: Path) -> None:
    qualities = [pack(folder, tmp_path / "a.zip", megabytes=room, longest_px=330) for room in (100, 1.2, 0.9)]
    assert qualities == sorted(qualities, reverse=True)
    assert qualities[0] > qualities[-1]
    with pytest.raises(UsageError, match=r"30 photographs do not fit into 0\.01 MB"):
        pack(folder, tmp_path / "b.zip", megabytes=0.01, longest_px=330)
    assert not (tmp_path / "b.zip").exists()
    assert pack(folder, tmp_path / "c.zip", megabytes=0.3, longest_px=100) >= 50


def test_wrong_paths_are_told_without_a_traceback(folder: Path, tmp_path: Path, refuses: Refuses) -> None:
    for arguments, said in (
        ([tmp_path / "none", tmp_path / "a.zip"], "none is not a folder"),
        ([folder, tmp_path / "none" / "a.zip"], "a.zip cannot be written: No such file"),
        ([folder, folder / "notes.txt" / "a.zip"], "a.zip cannot be written: Not a directory"),
        ([folder, tmp_path / "a.zip", "--longest-px", 0], "--longest-px is from 1 up, not 0"),
    ):
        with refuses(said):
            main(list(map(str, arguments)))


def test_a_full_disk_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    target = tmp_path / "packed.zip"
    target.write_bytes(b"of before")

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "writestr", fill)
    with refuses("packed.zip cannot be written: No space left"):
        main([str(folder), str(target)])
    assert target.read_bytes() == b"of before"
    assert sorted(tmp_path.iterdir()) == [target, folder]
