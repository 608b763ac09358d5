from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.training_data import CleanPhotographs, is_validation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (170, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photo-{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken-0.jpg").write_bytes(b"\xff\xd8 cut short")
    Image.new("RGB", (50, 50)).save(tmp_path / "small-1.png")
    return tmp_path


def test_training_and_validation_share_no_photograph_and_lose_none(folder: Path) -> None:
    training = CleanPhotographs.load(folder, validation=False).names
    held_out = CleanPhotographs.load(folder, validation=True).names
    assert set(training) | set(held_out) == {f"photo-{n}.png" for n in range(40)}
    assert not set(training) & set(held_out)
    assert all(is_validation(name) for name in held_out)


def test_a_folder_without_photographs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable photograph"):
        CleanPhotographs.load(tmp_path, validation=False)


@pytest.mark.parametrize("smallest_scale", [0.2, 1.0])
def test_patches_have_the_size_asked_for_and_repeat_with_the_seed(folder: Path, smallest_scale: float) -> None:
    photographs = CleanPhotographs.load(folder, validation=False)
    first, second = (
        photographs.patch(np.random.default_rng(3), side_px=64, smallest_scale=smallest_scale) for _ in range(2)
    )
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.float32
    assert 0 <= first.min() < first.max() <= 1
    assert np.array_equal(first, second)
