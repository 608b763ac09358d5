from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.errors import UsageError
from jobs.training_data import Photographs, is_validation


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
    training = Photographs.clean([folder], validation=False).names
    held_out = Photographs.clean([folder], validation=True).names
    assert set(training) | set(held_out) == {f"photo-{n}.png" for n in range(40)}
    assert not set(training) & set(held_out)
    assert all(is_validation(name) for name in held_out)


def test_a_folder_without_photographs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no usable photograph"):
        Photographs.clean([tmp_path], validation=False)
    with pytest.raises(UsageError, match=r"nowhere is not a folder.*data\.clean"):
        Photographs.clean([tmp_path / "nowhere"], validation=False)


def test_unreadable_files_are_named_and_too_many_of_them_are_an_error(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        (folder / f"cut-{number}.jpg").write_bytes(b"\xff\xd8")
    left = Photographs.clean([folder], validation=False, least_readable=0.5)
    assert "cut-3.jpg" in caplog.text
    assert not any(name.startswith("cut") for name in left.names)
    with pytest.raises(UsageError, match=r"can be read, less than 90%.*broken-0\.jpg"):
        Photographs.clean([folder], validation=False, least_readable=0.9)


@pytest.mark.parametrize("smallest_scale", [0.2, 1.0])
def test_patches_have_the_size_asked_for_and_repeat_with_the_seed(folder: Path, smallest_scale: float) -> None:
    photographs = Photographs.clean([folder], validation=False)
    (name, (first,)), (again, (second,)) = (
        photographs.patches(np.random.default_rng(3), side_px=64, smallest_scale=smallest_scale) for _ in range(2)
    )
    assert name == again
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert first.min() < first.max()
    assert np.array_equal(first, second)


def test_patches_of_a_pair_show_the_same_place(pairs: tuple[Path, Path]) -> None:
    photographs = Photographs.pairs(*pairs, validation=False)
    rng = np.random.default_rng(0)
    for _ in range(20):
        _, (degraded, reference) = photographs.patches(rng, side_px=48, smallest_scale=1.0)
        assert np.array_equal(degraded // 2, reference)


def test_a_pair_without_reference_or_of_two_sizes_is_named(pairs: tuple[Path, Path]) -> None:
    degraded, reference = pairs
    name = next(path.name for path in sorted(degraded.iterdir()) if not is_validation(path.name))
    Image.new("RGB", (200, 200)).save(reference / name)
    with pytest.raises(UsageError, match=f"{name} is of another size"):
        Photographs.pairs(degraded, reference, validation=False)
    (reference / name).unlink()
    with pytest.raises(UsageError, match=f"{name} has no reference"):
        Photographs.pairs(degraded, reference, validation=False)


def test_photographs_left_on_disk_give_the_same_patches(pairs: tuple[Path, Path]) -> None:
    held, read = (Photographs.pairs(*pairs, validation=False, on_disk=on_disk) for on_disk in (False, True))
    assert all(isinstance(picture, Path) for scene in read.scenes for picture in scene)
    for seed in range(5):
        first, second = (
            each.patches(np.random.default_rng(seed), side_px=40, smallest_scale=1.0) for each in (held, read)
        )
        assert first[0] == second[0]
        assert all(np.array_equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_references_are_found_by_what_names_share(tmp_path: Path) -> None:
    write_photographs(tmp_path / "clear", 12)
    for number in range(12):
        source = tmp_path / "clear" / f"photo-{number}.png"
        for strength in ("0.8", "0.9"):
            target = tmp_path / "hazy" / f"{number:04}_{strength}.png"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
    found = [
        Photographs.pairs(tmp_path / "hazy", tmp_path / "clear", validation=part, match="number")
        for part in (False, True)
    ]
    assert sum(len(part.names) for part in found) == 24
    assert all(np.array_equal(*scene) for part in found for scene in part.scenes)
    scenes = [{name.partition("_")[0] for name in part.names} for part in found]
    assert not scenes[0] & scenes[1]  # no scene is both trained on and held out
    write_photographs(tmp_path / "clear" / "twice", 1)
    (tmp_path / "clear" / "twice" / "photo-0.png").rename(tmp_path / "clear" / "again-0.png")
    with pytest.raises(UsageError, match=r"again-0\.png and .*photo-0\.png match the same"):
        Photographs.pairs(tmp_path / "hazy", tmp_path / "clear", validation=False, match="number")
