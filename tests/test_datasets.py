from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classifier.labels import Degradation
from jobs.datasets import TEST_SETS, find_examples
from jobs.errors import UsageError


def write(folder: Path, *names: str, size: tuple[int, int] = (24, 16)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size, (number, 100, 100)).save(folder / name)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of two images, as if the published ones were that small."""
    for name, test_set in TEST_SETS.items():
        monkeypatch.setitem(TEST_SETS, name, type(test_set)(**{**vars(test_set), "images": 2}))


def numbered(pattern: str) -> list[str]:
    return [pattern.format(number) for number in (1, 2)]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("dataset", "degraded", "reference"),
    [
        ("sots", "SOTS/outdoor/hazy/000{}_0.8_0.2.jpg", "SOTS/outdoor/gt/000{}.png"),
        ("sots", "input/000{}_0.9_0.16.jpg", "target/000{}.png"),
        ("rain100l", "Rain100L/rain/rain-00{}.png", "Rain100L/norain/norain-00{}.png"),
        ("rain100l", "rainy/rain-00{}.png", "norain-00{}.png"),
        ("rain100l", "rain/X2/norain-00{}x2.png", "norain/norain-00{}.png"),
        ("rain100l", "input/{}.png", "target/{}.png"),
        ("gopro", "test/GOPR0384_11_0{}/blur/000001.png", "test/GOPR0384_11_0{}/sharp/000001.png"),
        ("gopro", "input/a-{}.png", "target/a-{}.png"),
        ("lol", "eval15/low/{}.png", "eval15/high/{}.png"),
    ],
)
def test_the_original_layouts_are_recognised(tmp_path: Path, dataset: str, degraded: str, reference: str) -> None:
    for pattern in (degraded, reference):
        for name in numbered(pattern):
            write((tmp_path / name).parent, Path(name).name)
    found = find_examples(dataset, tmp_path)
    pairs = {
        (str(e.degraded.relative_to(tmp_path)), str(e.reference.relative_to(tmp_path))) for e in found if e.degraded
    }
    assert pairs == set(zip(numbered(degraded), numbered(reference), strict=True))
    assert {example.label for example in found} == {TEST_SETS[dataset].label}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("dataset", "files"),
    [
        ("cbsd68", ["original_png/0000.png", "original_png/0001.png", "noisy15/0000.png"]),
        ("kodak24", ["kodim01.png", "kodim02.png"]),
        ("urban100", [f"image_SRF_4/img_00{n}_SRF_4_{kind}.png" for n in (1, 2) for kind in ("HR", "LR")]),
    ],
)
def test_clean_sets_get_seeded_noise_of_three_strengths(tmp_path: Path, dataset: str, files: list[str]) -> None:
    for name in files:
        write((tmp_path / name).parent, Path(name).name, size=(90, 80))
    found = find_examples(dataset, tmp_path)
    assert [example.sigma_255 for example in found] == [15, 15, 25, 25, 50, 50]
    assert [example.sigma_255 for example in find_examples(dataset, tmp_path, limit=1)] == [15, 25, 50]
    (noisy, clean), (again, _) = (found[2].read() for _ in range(2))
    assert np.array_equal(noisy, again)
    assert noisy.dtype == np.uint8
    middle = clean[:, :, 1:].astype(float)
    assert float((noisy[:, :, 1:] - middle).std()) == pytest.approx(25, rel=0.03)
    assert not np.array_equal(found[3].read()[0] - found[3].read()[1], noisy - clean)


def test_a_noise_set_with_too_few_images_is_not_taken_for_several(tmp_path: Path) -> None:
    write(tmp_path, *(f"kodim{number:02}.png" for number in range(1, 25) if number != 7))
    with pytest.raises(UsageError, match="has 23 images; kodak24 has 24: number 7 is not there"):
        find_examples("kodak24", tmp_path)


def test_pairs_of_ones_own_need_a_label(tmp_path: Path) -> None:
    write(tmp_path / "degraded", "a.png", "b.jpg")
    write(tmp_path / "reference", "a.png", "b.png")
    found = find_examples("pairs", tmp_path, label="noise")
    assert [(example.name, example.label, example.sigma_255) for example in found] == [
        ("degraded/a", Degradation.NOISE, None), ("degraded/b", Degradation.NOISE, None),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="pairs need --label: noise, rain"):
        find_examples("pairs", tmp_path)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEST_SETS, "lol", type(TEST_SETS["lol"])(**{**vars(TEST_SETS["lol"]), "images": 3}))
    with pytest.raises(UsageError, match=r"found no images.*expected low/ and high/ or input/ and target/"):
        find_examples("lol", tmp_path)
    write(tmp_path / "low", "1.png", "3.png")
    write(tmp_path / "high", "1.png", "3.png")
    with pytest.raises(UsageError, match="has 2 images; lol has 3: number 2 is not there"):
        find_examples("lol", tmp_path)
    write(tmp_path / "low", "2.png")
    with pytest.raises(UsageError, match=r"low/2\.png has no reference in .*high"):
        find_examples("lol", tmp_path)
    write(tmp_path / "low", *(f"{n}.png" for n in range(4, 8)))
    write(tmp_path / "high", *(f"{n}.png" for n in range(2, 8)))
    with pytest.raises(UsageError, match="has 7 images; lol has 3: more than one set"):
        find_examples("lol", tmp_path)
    with pytest.raises(UsageError, match=r"unknown test set 'set5'; known are sots, .* and pairs"):
        find_examples("set5", tmp_path)
    with pytest.raises(UsageError, match="--label is for pairs"):
        find_examples("lol", tmp_path, label="noise")
    with pytest.raises(UsageError, match="is not a folder"):
        find_examples("lol", tmp_path / "nowhere")


def test_files_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    write(tmp_path / "degraded", "a.png")
    write(tmp_path / "reference", "a.png", size=(30, 30))
    (example,) = find_examples("pairs", tmp_path, label="rain")
    with pytest.raises(UsageError, match=r"a\.png and its reference .* different sizes"):
        example.read()
    (tmp_path / "reference" / "a.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"cannot read .*a\.png"):
        example.read()
