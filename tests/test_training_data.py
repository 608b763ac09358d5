from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.errors import UsageError
from jobs.training_data import Photographs, inventory, is_validation


def write_photographs(folder: Path, count: int = 40, *, seed: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (170, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo-{number}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_photographs(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken-0.jpg").write_bytes(b"\xff\xd8 cut short")
    Image.new("RGB", (50, 50)).save(tmp_path / "small-1.png")
    return tmp_path


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, Path]:
    degraded, reference = tmp_path / "degraded", tmp_path / "reference"
    write_photographs(degraded, seed=1)
    reference.mkdir()
    for path in degraded.iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(reference / path.name)
    return degraded, reference


def test_training_and_validation_share_no_photograph_and_lose_none(folder: Path) -> None:
    training = Photographs.clean([folder]).part(validation=False).names
    held_out = Photographs.clean([folder]).part(validation=True).names
    assert set(training) | set(held_out) == {f"photo-{n}.png" for n in range(40)}
    assert not set(training) & set(held_out)
    assert all(is_validation(name) for name in held_out)
    assert is_validation("photo-\udcff.png") in (True, False)  # a name that is no UTF-8


def test_a_folder_without_photographs_is_an_error(tmp_path: Path) -> None:
    write_photographs(tmp_path / "inside", 1)
    with pytest.raises(UsageError, match=r"no photograph in .*; folders in it are not searched"):
        Photographs.clean([tmp_path])
    with pytest.raises(UsageError, match=r"nowhere is not a folder.*data\.clean"):
        Photographs.clean([tmp_path / "nowhere"])


@pytest.mark.parametrize("nested", [0, 1])
def test_a_folder_of_pairs_without_photographs_is_told_so(pairs: tuple[Path, Path], nested: int) -> None:
    """GoPro comes in a folder for each film."""
    inside = pairs[nested].with_name("inside")
    pairs[nested].rename(inside)
    pairs[nested].mkdir()
    inside.rename(pairs[nested] / "film")
    with pytest.raises(UsageError, match=rf"no photograph in {pairs[nested]}; folders in it are not searched"):
        Photographs.pairs(*pairs)


def test_unreadable_files_are_named_and_too_many_of_them_are_an_error(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        (folder / f"cut-{number}.jpg").write_bytes(b"\xff\xd8")
    left = Photographs.clean([folder], least_readable=0.5).part(validation=False)
    assert "cut-3.jpg" in caplog.text
    assert not any(name.startswith("cut") for name in left.names)
    with pytest.raises(UsageError, match=r"can be read, less than 90%.*broken-0\.jpg"):
        Photographs.clean([folder], least_readable=0.9)


@pytest.mark.parametrize(("there", "broken", "share"), [(38, 2, 0.95), (11, 9, 0.55), (9, 1, 0.9)])
def test_the_readable_share_is_that_of_the_whole_folder_to_the_file(
    tmp_path: Path, there: int, broken: int, share: float
) -> None:
    """Whichever part the unreadable ones fall into; 0.55 x 20 is more than 11 in floating point."""
    write_photographs(tmp_path, there)
    for number in range(broken):
        (tmp_path / f"broken-{number}.png").write_bytes(b"no image")
    assert len(Photographs.clean([tmp_path], least_readable=share).names) == there


def test_a_folder_of_which_nothing_can_be_used_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"no usable photograph in .*: none of 1 can be read and has 160 px a side"):
        Photographs.clean([tmp_path], least_readable=0.0)


def test_small_photographs_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Photographs.clean([folder])
    assert "left out 1 of 42 photographs: a side has less than 160 px" in caplog.text


def test_a_folder_too_small_for_a_held_out_part_is_told_so(tmp_path: Path) -> None:
    write_photographs(tmp_path, 3)
    few = Photographs.clean([tmp_path])
    assert few.part(validation=False).names == few.names
    with pytest.raises(
        UsageError, match=r"none of 3 photographs \(photo-0\.png is the first\) falls into the held-out"
    ):
        few.part(validation=True)


def test_an_inventory_tells_scenes_apart(folder: Path, pairs: tuple[Path, Path]) -> None:
    clean, paired = Photographs.clean([folder]), Photographs.pairs(*pairs)
    parts = [clean.part(validation=part) for part in (False, True)]
    found = [inventory(each) for each in ([clean], [clean, paired], parts[:1], parts[1:])]
    assert len(set(found)) == 4
    assert found[0] == inventory([Photographs.clean([folder])])
    assert found[0].startswith("40 (names ")


@pytest.mark.parametrize("smallest_scale", [0.2, 1.0])
def test_patches_have_the_size_asked_for_and_repeat_with_the_seed(folder: Path, smallest_scale: float) -> None:
    photographs = Photographs.clean([folder]).part(validation=False)
    (name, (first,)), (again, (second,)) = (
        photographs.patches(np.random.default_rng(3), side_px=64, smallest_scale=smallest_scale) for _ in range(2)
    )
    assert name == again
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert first.min() < first.max()
    assert np.array_equal(first, second)


def test_patches_of_a_pair_show_the_same_place(pairs: tuple[Path, Path]) -> None:
    photographs = Photographs.pairs(*pairs)
    rng = np.random.default_rng(0)
    for _ in range(20):
        _, (degraded, reference) = photographs.patches(rng, side_px=48, smallest_scale=1.0)
        assert np.array_equal(degraded // 2, reference)


def test_a_pair_without_reference_or_of_two_sizes_is_named(pairs: tuple[Path, Path]) -> None:
    degraded, reference = pairs
    name = next(path.name for path in sorted(degraded.iterdir()) if not is_validation(path.name))
    Image.new("RGB", (200, 200)).save(reference / name)
    with pytest.raises(UsageError, match=f"{name} is of another size"):
        Photographs.pairs(degraded, reference)
    (reference / name).unlink()
    with pytest.raises(UsageError, match=f"{name} has no reference"):
        Photographs.pairs(degraded, reference)


def test_photographs_left_on_disk_give_the_same_patches(pairs: tuple[Path, Path]) -> None:
    held, read = (Photographs.pairs(*pairs, on_disk=on_disk) for on_disk in (False, True))
    assert all(isinstance(picture, Path) for scene in read.scenes for picture in scene)
    for seed in range(5):
        first, second = (
            each.patches(np.random.default_rng(seed), side_px=40, smallest_scale=1.0) for each in (held, read)
        )
        assert first[0] == second[0]
        assert all(np.array_equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_size_of_a_pair_is_that_of_the_upright_pictures(tmp_path: Path, on_disk: bool) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (180, 240, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for folder in ("degraded", "reference"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.rot90(upright)).save(tmp_path / "degraded" / "a.png", exif=exif)
    folders = tmp_path / "degraded", tmp_path / "reference"
    Image.fromarray(upright).save(tmp_path / "reference" / "a.png")
    found = Photographs.pairs(*folders, on_disk=on_disk)
    _, versions = found.patches(np.random.default_rng(0), side_px=100, smallest_scale=1.0)
    assert np.array_equal(*versions)
    Image.fromarray(np.rot90(upright)).save(tmp_path / "reference" / "a.png")
    with pytest.raises(UsageError, match=r"a\.png is of another size"):
        Photographs.pairs(*folders, on_disk=on_disk)


def test_pairs_smaller_than_a_patch_are_left_out(pairs: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    assert len(Photographs.pairs(*pairs, largest_patch_px=170).names) == 40
    with pytest.raises(UsageError, match=r"no usable pair in .*: none has 176 px a side and can be read"):
        Photographs.pairs(*pairs, largest_patch_px=176)
    assert "left out 40 of 40 photographs: a side has less than 176 px" in caplog.text


def test_references_are_found_by_what_names_share(tmp_path: Path) -> None:
    write_photographs(tmp_path / "clear", 12)
    for number in range(12):
        source = tmp_path / "clear" / f"photo-{number}.png"
        for strength in ("0.8", "0.9"):
            target = tmp_path / "hazy" / f"{number:04}_{strength}.png"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    found = [
        Photographs.pairs(tmp_path / "hazy", tmp_path / "clear", match="number").part(validation=part, match="number")
        for part in (False, True)
    ]
    assert sum(len(part.names) for part in found) == 24
    assert all(np.array_equal(*scene) for part in found for scene in part.scenes)
    scenes = [{name.partition("_")[0] for name in part.names} for part in found]
    assert not scenes[0] & scenes[1]  # no scene is both trained on and held out
    write_photographs(tmp_path / "clear" / "twice", 1)
    (tmp_path / "clear" / "twice" / "photo-0.png").rename(tmp_path / "clear" / "again-0.png")
    with pytest.raises(UsageError, match=r"again-0\.png and .*photo-0\.png match the same"):
        Photographs.pairs(tmp_path / "hazy", tmp_path / "clear", match="number")
