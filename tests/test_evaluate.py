import errno
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from numpy.typing import NDArray
from PIL import ExifTags, Image
from rich.console import Console
from scipy import stats
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from synthetic_classifier import write_tiny_classifier
from synthetic_weights import TINY, tiny_network, write_tiny_model
from typer.testing import CliRunner

from classifier.base import Prediction
from classifier.labels import LABELS, Degradation
from classifier.view import Views
from classifier.weights import load_weights as classifier_weights
from classifier.weights import save_classifier
from jobs import evaluate as evaluation
from jobs.cli import app
from jobs.datasets import TEST_SETS, find_examples
from jobs.errors import UsageError
from models import Restorer, load_restorer, orthogonal_bank
from models.dfpir import DFPIR
from models.weights import save_checkpoint

runner = CliRunner()


@pytest.fixture
def kodak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TEST_SETS, "kodak24", type(TEST_SETS["kodak24"])(**{**vars(TEST_SETS["kodak24"]), "images": 2}))
    folder = tmp_path / "kodak"
    folder.mkdir()
    Image.fromarray(data.astronaut()[:64, :80]).save(folder / "kodim01.png")
    Image.fromarray(data.coffee()[:72, :64]).save(folder / "kodim02.png")
    return folder


class Oracle:
    """A classifier that says what it is told to, surely if not told otherwise."""

    name, sha256 = "oracle", ""

    def __init__(self, label: Degradation, sigma_255: float = 0.0, *, threshold: float = 0.5) -> None:
        self.label, self.sigma_255, self.threshold = label, sigma_255, threshold

    def predict(self, images: list[np.ndarray]) -> list[Prediction]:
        shares = {label: float(label is self.label) for label in LABELS}
        return [Prediction(self.label, 1.0, 1.0, self.threshold, shares, self.sigma_255) for _ in images]

    def take_views(self, image: np.ndarray) -> Views:
        raise NotImplementedError

    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        raise NotImplementedError

    def prediction(self, probabilities: Mapping[Degradation, float], *, noise_sigma_255: float) -> Prediction:
        raise NotImplementedError


@pytest.fixture
def restorer(tmp_path: Path) -> Restorer:
    return load_restorer(write_tiny_model(tmp_path / "model.safetensors"))


def test_results_are_those_of_scikit_image_on_unrounded_pixels(kodak: Path, restorer: Restorer) -> None:
    examples = find_examples("kodak24", kodak)
    results = list(evaluation.evaluate(examples, restorer, Oracle(Degradation.NOISE, 50.0)))
    for example, result in zip(examples, results, strict=True):
        degraded, reference = (pixels.astype(np.float32) / 255 for pixels in example.read())
        options = {"data_range": 1, "channel_axis": 2}
        for kind, image in (
            ("input", degraded),
            ("given", restorer.restore([degraded], [f"noise{example.sigma_255}"])[0]),
            ("predicted", restorer.restore([degraded], ["noise50"])[0]),
        ):
            psnr = peak_signal_noise_ratio(reference, image, data_range=1)
            assert getattr(result, f"psnr_{kind}_db") == pytest.approx(psnr, abs=1e-4)
            assert getattr(result, f"ssim_{kind}") == pytest.approx(
                structural_similarity(reference, image, **options), abs=1e-4
            )
    assert {result.predicted_prompt for result in results} == {"noise50"}
    assert [result.given_prompt for result in results] == ["noise15"] * 2 + ["noise25"] * 2 + ["noise50"] * 2


def test_what_is_taken_for_clean_scores_as_its_input(kodak: Path, restorer: Restorer) -> None:
    for result in evaluation.evaluate(find_examples("kodak24", kodak), restorer, Oracle(Degradation.CLEAN)):
        assert result.predicted_prompt is None
        assert result.psnr_predicted_db == result.psnr_input_db != result.psnr_given_db
        assert result.ssim_predicted == result.ssim_input


def test_what_is_too_unsure_to_be_restored_is_not_recognised(kodak: Path, restorer: Restorer) -> None:
    examples = find_examples("kodak24", kodak)
    told = {}
    for name, oracle in (
        ("sure", Oracle(Degradation.NOISE, 20.0)),
        ("unsure", Oracle(Degradation.NOISE, 20.0, threshold=2.0)),
        ("wrong", Oracle(Degradation.RAIN)),
        ("clean", Oracle(Degradation.CLEAN)),
    ):
        first = next(iter(evaluation.evaluate(examples, restorer, oracle)))
        told[name] = (first.predicted_status, first.recognised)
        assert first.confidence == 1.0
    assert told == {
        "sure": ("restored", True),
        "unsure": ("abstained", False),
        "wrong": ("restored", False),
        "clean": ("copied", False),
    }


def test_intervals_are_students() -> None:
    values = [3.0, 4.0, 8.0]
    low, high = stats.t.interval(0.95, 2, loc=5.0, scale=stats.sem(values))
    assert evaluation.interval(values) == pytest.approx((high - low) / 2)
    assert math.isnan(evaluation.interval([1.0]))


def test_published_figures_stand_beside_the_same_protocol() -> None:
    assert evaluation.published("cbsd68", 25) == {"dfpir-3tasks": 31.47, "dfpir-5tasks": 31.29}
    assert evaluation.published("gopro", None) == {"dfpir-5tasks": 28.82}
    assert evaluation.published("kodak24", 25) == {}


def test_the_command_prints_a_table_and_writes_a_row_per_image(kodak: Path, tmp_path: Path) -> None:
    model, classifier = write_tiny_model(tmp_path / "m.safetensors"), write_tiny_classifier(tmp_path / "c.safetensors")
    out = tmp_path / "rows.parquet"
    command = ["evaluate", "--dataset", "kodak24", "--root", str(kodak), "--out", str(out), "--device", "cpu"]
    weights = ["--model", str(model), "--classifier", str(classifier), "--dtype", "float32"]
    result = runner.invoke(app, [*command, *weights])
    assert result.exit_code == 0, result.output
    assert all(f"kodak24 {sigma}" in result.stdout for sigma in (15, 25, 50))
    rows = pq.read_table(out)
    assert rows.num_rows == 6
    assert rows.schema.metadata[b"dataset"] == b"kodak24"
    assert rows.schema.metadata[b"weights_sha256"].decode() == load_restorer(model).sha256
    result = runner.invoke(app, [*command[:4], str(kodak / "none"), *weights])
    assert result.exit_code == 2
    assert "is not a folder" in result.stderr


def test_a_label_that_the_model_has_no_prompt_for_is_refused(tmp_path: Path) -> None:
    for name in ("degraded", "reference"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "a.png")
    bank = orthogonal_bank().only(["noise15", "noise25", "noise50"])
    save_checkpoint(tmp_path / "n.safetensors", tiny_network(3), bank, licence="", provenance={})
    command = ["evaluate", "--dataset", "pairs", "--label", "haze", "--root", str(tmp_path)]
    result = runner.invoke(app, [*command, "--model", str(tmp_path / "n.safetensors"), "--device", "cpu"])
    assert result.exit_code == 2
    assert "no prompt haze, which these images need; only noise15" in result.stderr


def test_a_model_without_all_prompts_of_noise_is_refused_where_their_images_need_them(
    kodak: Path, tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    bank = orthogonal_bank().only(["noise25", "haze"])
    save_checkpoint(path, tiny_network(3), bank, licence="", provenance={})
    command = ["evaluate", "--dataset", "kodak24", "--root", str(kodak), "--out", str(tmp_path / "rows.parquet")]
    result = runner.invoke(app, [*command, "--model", str(path), "--device", "cpu"])
    assert result.exit_code == 2
    assert "no prompt noise15, noise50, which these images need; only noise25, haze" in result.stderr
    examples, restorer = find_examples("kodak24", kodak), load_restorer(path)
    evaluation.check_prompts([example for example in examples if example.sigma_255 == 25], restorer)
    with pytest.raises(UsageError, match="no prompt noise15, noise50"):  # the strength will be an estimate
        evaluation.check_prompts([replace(examples[0], sigma_255=None)], restorer)


def test_the_table_fits_eighty_columns(kodak: Path, restorer: Restorer) -> None:
    results = list(evaluation.evaluate(find_examples("kodak24", kodak), restorer, Oracle(Degradation.NOISE, 20.0)))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(evaluation.table("cbsd68", results))
    text = console.export_text()
    assert "…" not in text
    title, _, first = text.splitlines()[:3]
    assert "right: the true label, surely enough to be restored" in title
    assert first.startswith("cbsd68 15")
    assert "2 right" in text
    assert "34.14" in text
    assert "31.29" in text


def test_the_table_tells_how_many_images_have_no_ssim(kodak: Path, restorer: Restorer) -> None:
    found = list(evaluation.evaluate(find_examples("kodak24", kodak), restorer, Oracle(Degradation.CLEAN)))
    assert evaluation.table("kodak24", found).caption is None
    small = [replace(result, ssim_input=math.nan) if result.name == "kodim02" else result for result in found]
    told = evaluation.table("kodak24", small).caption
    assert told == "SSIM leaves out images with a side of less than 7 px: 1 of 2"


def test_the_psnr_of_equal_images_is_finite() -> None:
    image = torch.rand(16, 16, 3).numpy()
    assert evaluation.scores(image, image) == (100.0, 1.0)


def test_files_of_all_sets_have_the_same_columns(kodak: Path, restorer: Restorer, tmp_path: Path) -> None:
    found = list(evaluation.evaluate(find_examples("kodak24", kodak), restorer, Oracle(Degradation.NOISE, 20.0)))
    without = [replace(result, sigma_255=None, predicted_prompt=None) for result in found]
    for name, rows in (("a", found), ("b", without)):
        evaluation.write(rows, tmp_path / f"{name}.parquet", {})
    schemas = [pq.read_schema(tmp_path / f"{name}.parquet") for name in "ab"]
    assert schemas[0].equals(schemas[1])
    assert schemas[0].names == [field.name for field in fields(evaluation.Result)]
    assert str(schemas[0].field("sigma_255").type) == "int64"


def test_an_image_smaller_than_the_window_has_no_ssim() -> None:
    image = torch.rand(6, 16, 3).numpy()
    psnr, ssim = evaluation.scores(image, 1 - image)
    assert math.isfinite(psnr)
    assert math.isnan(ssim)


def evaluated(root: Path, *more: str, seed: int = 0) -> tuple[Result, Path]:
    """A call of `dfpir evaluate` over hazy pairs, and where its rows go."""
    model, classifier = root / f"m{seed}.safetensors", root / "c.safetensors"
    if not model.exists():  # the same weights, written again, are another file
        write_tiny_model(model, seed=seed)
    if not classifier.exists():
        write_tiny_classifier(classifier)
    weights = ["--model", str(model), "--classifier", str(classifier), "--device", "cpu", *more]
    out = root / "rows.parquet"
    command = ["evaluate", "--dataset", "pairs", "--label", "haze", "--root", str(root), "--out", str(out)]
    return runner.invoke(app, [*command, *weights]), out


def hazy_pairs(root: Path, count: int) -> None:
    for name in ("degraded", "reference"):
        (root / name).mkdir()
        for number in range(count):
            Image.new("RGB", (32, 32), (number, 90, 90)).save(root / name / f"{number}.png")


def test_what_was_measured_before_a_file_that_cannot_be_read_is_kept(tmp_path: Path) -> None:
    hazy_pairs(tmp_path, 3)
    path = tmp_path / "degraded" / "2.png"
    path.write_bytes(path.read_bytes()[:50])  # its header can be read
    result, out = evaluated(tmp_path)
    assert result.exit_code == 2
    assert "cannot read" in result.stderr
    assert "2 of 3 rows: rows.partial.parquet" in result.stdout
    assert not out.exists()
    rows = pq.read_table(tmp_path / "rows.partial.parquet")
    assert rows.column("name").to_pylist() == ["degraded/0", "degraded/1"]
    assert rows.schema.metadata[b"rows"] == b"2 of 3 rows"
    Image.new("RGB", (32, 32)).save(path)
    result, _ = evaluated(tmp_path)
    assert result.exit_code == 0, result.output
    assert pq.read_metadata(out).num_rows == 3
    assert not (tmp_path / "rows.partial.parquet").exists()


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "dfpir: interrupted\n"),
        (MemoryError(), 1, "2 does not fit into memory, whole as the protocol has it"),
    ],
)
def test_what_was_measured_before_an_interruption_or_a_full_memory_is_kept_until_the_evaluation_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, code: int, said: str
) -> None:
    hazy_pairs(tmp_path, 3)
    restore = Restorer.restore

    def broken(restorer: Restorer, images: list[NDArray[np.float32]], keys: list[str]) -> object:
        if images[0][0, 0, 0] * 255 > 1.5:
            raise fault
        return restore(restorer, images, keys)

    with monkeypatch.context() as breaking:
        breaking.setattr(Restorer, "restore", broken)
        result, _ = evaluated(tmp_path)
    assert result.exit_code == code
    assert said in result.stderr
    assert pq.read_table(tmp_path / "rows.partial.parquet")["name"].to_pylist() == ["degraded/0", "degraded/1"]
    assert evaluated(tmp_path)[0].exit_code == 0
    assert [path.name for path in tmp_path.glob("rows*")] == ["rows.parquet"]


def test_an_ablation_is_refused_in_plain_words(tmp_path: Path) -> None:
    hazy_pairs(tmp_path, 1)
    config = replace(TINY, attention_perturbation=False)
    path = tmp_path / "ablation.safetensors"
    save_checkpoint(path, DFPIR(config), orthogonal_bank(), licence="CC0-1.0", provenance={"by": "a test"})
    result, _ = evaluated(tmp_path, "--model", str(path))
    assert result.exit_code == 2
    assert "is an ablation" in result.stderr


def test_files_that_cannot_be_evaluated_are_named_before_the_first_restoration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Restorer, "restore", None)
    hazy_pairs(tmp_path, 8)
    (tmp_path / "degraded" / "5.png").write_bytes(b"no image")
    for folder in ("degraded", "reference"):
        (tmp_path / folder / "6.png").write_bytes(b"")
    Image.new("RGB", (32, 31)).save(tmp_path / "degraded" / "7.png")
    result, _ = evaluated(tmp_path)
    assert result.exit_code == 2
    assert "3 of 8 images cannot be evaluated: cannot read " in result.stderr
    assert "degraded/5.png: the content is not an image" in result.stderr
    assert "reference/6.png: the file is empty" in result.stderr
    assert f"{tmp_path}/degraded/7.png and its reference {tmp_path}/reference/7.png are of different" in result.stderr
    assert not list(tmp_path.glob("rows*"))
    for number in range(5):
        (tmp_path / "degraded" / f"{number}.png").write_bytes(b"")
    assert "8 of 8 images" in evaluated(tmp_path)[0].stderr
    assert "; and 3 more" in evaluated(tmp_path)[0].stderr


def test_a_pair_of_which_exif_turns_one_is_not_refused_before_it_is_read(tmp_path: Path) -> None:
    hazy_pairs(tmp_path, 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 32)).save(tmp_path / "degraded" / "0.png", exif=exif)
    Image.new("RGB", (32, 40)).save(tmp_path / "reference" / "0.png")
    (example,) = examples = find_examples("pairs", tmp_path, label="haze")
    evaluation.check_files(examples)
    assert example.read()[0].shape == (40, 32, 3)


def test_an_evaluation_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    for name, size in (("degraded", 32), ("reference", 40)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (size, size)).save(tmp_path / name / "a.png")
    result, out = evaluated(tmp_path)
    assert result.exit_code == 2
    assert "different sizes" in result.stderr
    assert not out.exists()


def test_rows_that_no_disk_takes_are_shown_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    hazy_pairs(tmp_path, 2)
    monkeypatch.setattr(evaluation, "write", refuse)
    result, _ = evaluated(tmp_path)
    assert result.exit_code == 2
    assert "PSNR" in result.stdout


def test_only_the_same_evaluation_replaces_its_rows(tmp_path: Path) -> None:
    hazy_pairs(tmp_path, 2)
    weights = ["--dtype", "float32"]
    for _ in range(2):
        result, out = evaluated(tmp_path, *weights)
        assert result.exit_code == 0, result.output
    before = out.read_bytes()
    other = tmp_path / "other.safetensors"
    found = classifier_weights(str(tmp_path / "c.safetensors"))
    save_classifier(
        other, found.network, view=found.view, temperature=2.0, thresholds=found.thresholds, licence="CC0-1.0",
        provenance={},
    )  # fmt: skip
    for more, seed, what in (
        ([*weights, "--limit", "1"], 0, "images, files_sha256"),
        (weights, 1, "weights_sha256"),
        ([*weights, "--classifier", str(other)], 0, "classifier_sha256"),
        (["--dtype", "bfloat16"], 0, "dtype"),
    ):
        result, _ = evaluated(tmp_path, *more, seed=seed)
        assert result.exit_code == 2
        assert f"another evaluation (another {what}); move it away" in result.stderr
    Image.new("RGB", (32, 32), "green").save(tmp_path / "degraded" / "1.png")
    result, _ = evaluated(tmp_path, *weights)
    assert result.exit_code == 2
    assert "another evaluation (another files_sha256); move it away" in result.stderr
    assert out.read_bytes() == before


def test_a_file_that_holds_no_results_is_left_alone(tmp_path: Path) -> None:
    hazy_pairs(tmp_path, 1)
    for name, said in (("rows", "no file of results"), ("rows.partial", "results of another evaluation")):
        path = tmp_path / f"{name}.parquet"
        if name == "rows":
            path.write_text("mine")
        else:
            pq.write_table(pa.table({"mine": [1]}), path)
        before = path.read_bytes()
        result, _ = evaluated(tmp_path)
        assert result.exit_code == 2
        assert said in result.stderr
        assert path.read_bytes() == before
        path.unlink()
