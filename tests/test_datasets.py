import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from classifier.labels import Degradation
from jobs.datasets import TEST_SETS, Example, find_examples, is_photograph, read_rgb, with_noise
from jobs.errors import UsageError


def write(folder: Path, *names: str, size: tuple[int, int] = (24, 16)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size, (number, 100, 100)).save(folder / name)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of two images, as if the published ones were that small."""
    for name, test_set in TEST_SETS.items():
        monkeypatch.setitem(TEST_SETS, name, type(test_set)(**{**vars(test_set), "images": 2, "references": 0}))


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
        ("rain100l", "rainy/rain-00{}.png", "gt/norain-00{}.png"),
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
        (
            "cbsd68",
            [
                "CBSD68-dataset/CBSD68/original_png/0000.png",
                "CBSD68-dataset/CBSD68/original_png/0001.png",
                "CBSD68-dataset/CBSD68/noisy15/0000.png",
            ],
        ),
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


@pytest.mark.parametrize(
    ("dataset", "pattern", "there", "said"),
    [
        ("kodak24", "kodim{:02}.png", range(2, 25), "has 23 images; kodak24 has 24: number 1 is not there"),
        ("kodak24", "kodim{:02}.png", range(1, 24), "has 23 images; kodak24 has 24: number 24 is not there"),
        ("cbsd68", "{:04}.png", range(1, 68), "has 67 images; cbsd68 has 68: number 0 is not there"),
        ("cbsd68", "{:04}.png", range(2, 68), "cbsd68 has 68: numbers 0, 1 are not there"),
        ("kodak24", "kodim{:02}.png", range(1, 26), "kodak24 has 24: move what is not of the set elsewhere: kodim25$"),
        ("kodak24", "photo{:02}.png", range(30, 55), "kodak24 has 24: look for what is not of the set$"),
        ("cbsd68", "{:04}.png", range(100, 167), "has 67 images; cbsd68 has 68: look for what is missing"),
    ],
)
def test_what_a_numbered_set_lacks_is_named(
    tmp_path: Path, dataset: str, pattern: str, there: range, said: str
) -> None:
    write(tmp_path, *map(pattern.format, there))
    with pytest.raises(UsageError, match=said):
        find_examples(dataset, tmp_path)


PARTS = {
    "sots": ("SOTS/outdoor", "SOTS/indoor", "hazy/{}_1.png", "gt/{}.png"),
    "gopro": ("GOPRO_Large/test/GOPR0384_11_00", "GOPRO_Large/train/GOPR0372_07_00", "blur/{}.png", "sharp/{}.png"),
    "lol": ("LOLdataset/eval15", "LOLdataset/our485", "low/{}.png", "high/{}.png"),
}


def write_pairs(folder: Path, degraded: str, reference: str, numbers: range) -> None:
    for pattern in (degraded, reference):
        write((folder / pattern).parent, *(Path(pattern).name.format(number) for number in numbers))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dataset", PARTS)
def test_of_a_whole_download_the_published_part_is_taken(tmp_path: Path, dataset: str) -> None:
    part, other, *patterns = PARTS[dataset]
    write_pairs(tmp_path / part, *patterns, range(1, 3))
    write_pairs(tmp_path / other, *patterns, range(1, 6))
    expected = [example.reference for example in find_examples(dataset, tmp_path / part)]
    assert [example.reference for example in find_examples(dataset, tmp_path)] == expected
    with pytest.raises(UsageError, match=f"give the folder {TEST_SETS[dataset].part} of the download as --root"):
        find_examples(dataset, tmp_path / other)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("dataset", "inside"), [("lol", "low high"), ("kodak24", "original"), ("urban100", "HR")])
def test_where_several_sets_lie_the_folder_that_is_named_works(tmp_path: Path, dataset: str, inside: str) -> None:
    for name, count in (("a", 2), ("b", 3)):
        for folder in inside.split():
            write(tmp_path / name / folder, *(f"{number}.png" for number in range(count)))
    with pytest.raises(UsageError, match=f"give one of them as --root: {tmp_path / 'a'}$"):
        find_examples(dataset, tmp_path)
    assert find_examples(dataset, tmp_path / "a")


def test_sots_indoor_is_not_taken_for_the_published_set(tmp_path: Path) -> None:
    write(tmp_path / "gt", *(f"{number}.png" for number in range(50)))
    write(tmp_path / "hazy", *(f"{number}_{haze}.png" for number in range(50) for haze in range(10)))
    for limit in (None, 3):
        with pytest.raises(UsageError, match=r"has 500 images of 50 references; sots has 492 .* not be comparable"):
            find_examples("sots", tmp_path, limit=limit)


@pytest.mark.usefixtures("few")
def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    stored, root = tmp_path / "stored", tmp_path / "root"
    write_pairs(stored / "eval15", "low/{}.png", "high/{}.png", range(1, 3))
    root.mkdir()
    (root / "LOL").symlink_to(stored)
    (root / "again").symlink_to(stored)
    (stored / "above").symlink_to(root)
    assert [example.name for example in find_examples("lol", root)] == ["LOL/eval15/low/1", "LOL/eval15/low/2"]
    write(tmp_path / "kodak", "1.png", "2.png")
    (root / "original").symlink_to(tmp_path / "kodak")
    assert len(find_examples("kodak24", root)) == 6


def test_pairs_that_lie_deeper_than_others_are_named(tmp_path: Path) -> None:
    for folder in ("degraded", "reference"):
        write(tmp_path / folder, "a.png")
        write(tmp_path / folder / "more", "b.png")
    with pytest.raises(UsageError, match=r"degraded/more/b\.png lies deeper than the other images of .*/degraded;"):
        find_examples("pairs", tmp_path, label="rain")
    for folder in ("degraded", "reference"):
        (tmp_path / folder / "a.png").unlink()
    with pytest.raises(UsageError, match=r"found no images of pairs .*, with the images in them and not deeper"):
        find_examples("pairs", tmp_path, label="rain")


def test_a_noise_set_that_is_not_there_is_told_where_it_may_lie(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find_examples("cbsd68", tmp_path)
    assert str(caught.value) == (
        f"found no images of cbsd68 under {tmp_path}; expected clean images in original_png/, original/, HR/, "
        "image_SRF_4/, at any depth, or in it itself"
    )


def test_a_reference_without_degraded_image_is_named(tmp_path: Path) -> None:
    write(tmp_path / "eval15" / "low", *(f"{number}.png" for number in range(14)))
    write(tmp_path / "eval15" / "high", *(f"{number}.png" for number in range(14)), "79.png")
    with pytest.raises(UsageError, match=r"high/79\.png has no degraded image in .*low"):
        find_examples("lol", tmp_path)


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
    with pytest.raises(
        UsageError, match=r"found no images of lol under .*expected low/ and high/ or input/ and target/"
    ):
        find_examples("lol", tmp_path)
    write(tmp_path / "low", "1.png", "3.png")
    write(tmp_path / "high", "1.png", "3.png")
    with pytest.raises(UsageError, match="has 2 images; lol has 3: look for what is missing"):
        find_examples("lol", tmp_path)
    write(tmp_path / "low", "2.png")
    with pytest.raises(UsageError, match=r"low/2\.png has no reference in .*high"):
        find_examples("lol", tmp_path)
    write(tmp_path / "low", *(f"{n}.png" for n in range(4, 8)))
    write(tmp_path / "high", *(f"{n}.png" for n in range(2, 8)))
    with pytest.raises(UsageError, match=r"has 7 images; lol has 3: .* give the folder eval15 of the download"):
        find_examples("lol", tmp_path)
    for name in ("low", "high"):
        write(tmp_path / "whole" / "eval15" / name, *(f"{n}.png" for n in range(4)))
    for root in (tmp_path / "whole", tmp_path / "whole" / "eval15"):
        with pytest.raises(UsageError, match="has 4 images; lol has 3: look for what is not of the set"):
            find_examples("lol", root)
    monkeypatch.chdir(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"\. has 4 images; lol has 3: look for what is not of the set"):
        find_examples("lol", Path("."))
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


def test_a_png_with_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    assert data.count(b"IDAT") > 2
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    path.write_bytes(data[: second - 4] + bytes(8) + data[second + 4 :])
    with pytest.raises(UsageError, match=r"cannot read .*damaged\.png: broken PNG file"):
        read_rgb(path)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_deep_greyscale_is_scaled_to_eight_bits(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 24 * 16).reshape(16, 24)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / name)
    expected = np.rint(values / 257)[..., None].repeat(3, axis=2)
    assert np.abs(read_rgb(tmp_path / name) - expected).max() <= 1


def test_floating_point_greyscale_is_scaled_to_eight_bits(tmp_path: Path) -> None:
    levels = np.linspace(0, 1, 256, dtype=np.float32)[None, :]
    Image.fromarray(levels).save(tmp_path / "a.tif")
    assert np.array_equal(read_rgb(tmp_path / "a.tif")[0, :, 1], np.arange(256))
    Image.fromarray(levels * 255).save(tmp_path / "b.tif")
    with pytest.raises(UsageError, match=r"b\.tif: floating-point values beyond 0..1 have no known white level"):
        read_rgb(tmp_path / "b.tif")


def test_an_example_is_seen_as_a_run_would_see_it(tmp_path: Path) -> None:
    """Without the black that alpha hides, and refused where rows are missing."""
    pixels = np.random.default_rng(0).integers(100, 156, (64, 64, 4), dtype=np.uint8)
    pixels[:, :, 3] = 255
    pixels[40:] = 0
    for name in ("degraded", "reference"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    example = Example("a", tmp_path / "reference.png", tmp_path / "degraded.png", Degradation.NOISE)
    for image in example.read():
        assert np.array_equal(image[:40], pixels[:40, :, :3])
        assert image.min() >= 100
    compressed = zlib.compress((b"\0" + bytes(range(64)) * 3) * 32)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)), (b"IDAT", compressed), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (tmp_path / "reference.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(UsageError, match=r"cannot read .*reference\.png: "):
        example.read()


def test_the_shadows_that_macos_makes_are_no_photographs() -> None:
    assert [is_photograph(Path(name)) for name in ("a.PNG", "._a.png", "a.txt")] == [True, False, False]


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_a_picture_stands_the_way_up_that_exif_tells(tmp_path, mode):
    upright = np.zeros((20, 40), np.uint16)
    upright[:10] = 65535
    turned = np.rot90(upright)  # as a camera held upright writes it
    picture = (
        Image.fromarray(turned) if mode == "I;16" else Image.fromarray((turned >> 8).astype(np.uint8)).convert("RGB")
    )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_rgb(tmp_path / "turned.png")[:, :, 0], upright >> 8)


def test_noise_is_rounded_so_that_it_has_no_bias_and_the_strength_that_is_said() -> None:
    noise = with_noise(np.full((300, 300, 3), 128, np.uint8), 25, seed=0).astype(float) - 128
    assert abs(noise.mean()) < 0.2
    assert noise.std() == pytest.approx(25, rel=0.01)
