import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from synthetic_classifier import write_tiny_classifier
from synthetic_weights import write_tiny_model
from test_evaluate import Oracle
from typer.testing import CliRunner

from classifier.base import Prediction
from classifier.labels import LABELS, Degradation
from jobs import figures
from jobs.cli import app
from jobs.errors import UsageError
from models import load_restorer
from models.weights import load_checkpoint


def surely(label: Degradation, confidence: float = 1.0) -> Prediction:
    rest = (1 - confidence) / (len(LABELS) - 1)
    shares = {each: confidence if each is label else rest for each in LABELS}
    return Prediction(label, confidence, confidence - rest, 0.0, shares, 20.0)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    folder = tmp_path / "labelled"
    for label in (Degradation.NOISE, Degradation.RAIN, Degradation.CLEAN):
        (folder / str(label)).mkdir(parents=True)
        for number in range(3):
            pixels = np.roll(data.astronaut(), 40 * number, axis=1)[:72, :80]
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return folder


def test_a_confusion_matrix_counts_what_was_taken_for_what() -> None:
    truth = [Degradation.NOISE, Degradation.NOISE, Degradation.RAIN]
    figure = figures.confusion(
        truth, [surely(label) for label in (Degradation.NOISE, Degradation.HAZE, Degradation.RAIN)]
    )
    (axes,) = figure.axes
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    rows = [text.get_text() for text in axes.get_yticklabels()]
    place = {
        (LABELS.index(Degradation.NOISE), 0),
        (LABELS.index(Degradation.HAZE), 0),
        (LABELS.index(Degradation.RAIN), 1),
    }
    assert rows == ["noise", "rain"]
    assert counts == dict.fromkeys(place, "1")
    assert axes.get_title() == "2 of 3 right"


def test_a_reliability_diagram_shows_shares_of_right_ones_by_confidence() -> None:
    truth = [Degradation.NOISE] * 4
    predictions = [surely(Degradation.NOISE, 0.95)] * 3 + [surely(Degradation.RAIN, 0.95)]
    (axes,) = figures.reliability(truth, predictions).axes
    (bar,) = axes.patches
    assert (bar.get_x(), bar.get_height()) == (pytest.approx(0.9), 0.75)
    assert axes.texts[0].get_text() == "4"
    assert axes.get_title() == "expected calibration error 0.200, all labels alike"


def test_a_bar_stands_where_its_predictions_are_as_confident() -> None:
    predictions = [surely(Degradation.NOISE, confidence) for confidence in (0.34, 0.36, 0.75, 1.0)]
    (axes,) = figures.reliability([Degradation.NOISE] * 4, predictions).axes
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([0.3, 0.7, 0.9])
    assert [text.get_text() for text in axes.texts] == ["2", "1", "1"]


def test_labels_count_alike_in_a_reliability_diagram_however_many_pictures_they_have() -> None:
    truth = [Degradation.NOISE] * 6 + [Degradation.HAZE] * 2
    predictions = [surely(Degradation.NOISE, 0.95)] * 6 + [surely(Degradation.RAIN, 0.95)] * 2
    (axes,) = figures.reliability(truth, predictions).axes
    assert [bar.get_height() for bar in axes.patches] == [0.5]
    assert axes.get_title() == "expected calibration error 0.450, all labels alike"


def test_latent_features_are_means_that_the_prompt_changes(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_tiny_model(tmp_path / "model.safetensors"))
    picture = figures.middle(figures.Labelled(data.coffee()[:72, :83], Degradation.RAIN), 16)
    assert np.array_equal(picture.pixels, data.coffee()[4:68, 9:73])
    features = figures.latent_features(checkpoint, [(picture, "rain"), (picture, "haze")])
    channels = 8 * checkpoint.network.config.dim
    assert features["before"].shape == features["after"].shape == (2, channels)
    assert np.allclose(features["before"][0], features["before"][1])
    assert not np.allclose(features["after"][0], features["after"][1], atol=1e-4)


def test_the_sheet_shows_what_restore_would_leave(labelled: Path, tmp_path: Path) -> None:
    restorer = load_restorer(write_tiny_model(tmp_path / "model.safetensors"))
    found = list(figures.pictures(labelled, per_label=1))
    oracle = Oracle(Degradation.RAIN)
    sheet = figures.sheet([(picture, oracle.predict([picture.pixels])[0]) for picture in found], restorer)
    titles = [axes.get_title() for axes in sheet.axes]
    assert [*titles[:3], *titles[3:]] == ["noise", "rain", "clean", "rain", "rain", "rain"]
    shown = [axes.images[0].get_array() for axes in sheet.axes]
    assert np.array_equal(shown[0], found[0].pixels)
    assert np.array_equal(shown[3], restorer.restore([found[0].pixels], ["rain"])[0])
    grey = np.repeat(found[0].pixels[:, :, :1], 3, axis=2)
    sheet = figures.sheet([(figures.Labelled(grey, Degradation.NOISE), oracle.predict([grey])[0])], restorer)
    assert np.ptp(sheet.axes[1].images[0].get_array(), axis=2).max() == 0


def test_the_command_writes_every_figure_twice(labelled: Path, tmp_path: Path) -> None:
    model, classifier = write_tiny_model(tmp_path / "m.safetensors"), write_tiny_classifier(tmp_path / "c.safetensors")
    weights = ["--model", str(model), "--classifier", str(classifier), "--device", "cpu"]
    result = CliRunner().invoke(app, ["figures", str(labelled), str(tmp_path / "out"), *weights])
    assert result.exit_code == 0, result.output
    names = {"confusion", "reliability", "before-after", "latent"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{n}.{k}" for n in names for k in ("png", "svg")}
    for path in (tmp_path / "out").glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path


def test_figures_are_not_written_among_the_pictures(labelled: Path, tmp_path: Path) -> None:
    model, classifier = write_tiny_model(tmp_path / "m.safetensors"), write_tiny_classifier(tmp_path / "c.safetensors")
    weights = ["--model", str(model), "--classifier", str(classifier), "--device", "cpu"]
    before = sorted(labelled.rglob("*"))
    (tmp_path / "link").symlink_to(labelled)
    for out in (labelled, labelled / "noise", labelled / "new", tmp_path / "link" / "new"):
        result = CliRunner().invoke(app, ["figures", str(labelled), str(out), *weights])
        assert result.exit_code == 2
        assert f"{out} lies in {labelled}, whose pictures are drawn" in result.stderr
    assert sorted(labelled.rglob("*")) == before


def test_a_figure_of_other_photographs_does_not_stay(tmp_path: Path) -> None:
    for name in ("latent.png", "latent.svg", "mine.png"):
        (tmp_path / name).touch()
    figures.save({"confusion": figures.confusion([Degradation.RAIN], [surely(Degradation.RAIN)])}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "confusion.svg", "mine.png"}


def test_pictures_too_small_for_the_network_are_left_out_and_told(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("small", "flat"):
        size = (5, 5) if name == "small" else (200, 9)
        Image.new("RGB", size).save(labelled / "rain" / f"{name}.png")
    model = write_tiny_model(tmp_path / "m.safetensors")
    found = figures.pictures(labelled, per_label=9)
    drawn = figures.draw(found, load_restorer(model), Oracle(Degradation.RAIN), load_checkpoint(model))
    assert set(drawn) == {"confusion", "reliability", "before-after", "latent"}
    assert drawn["confusion"].axes[0].get_title() == "5 of 11 right"
    assert [len(points.get_offsets()) for points in drawn["latent"].axes[0].collections] == [3, 3]
    assert "leave out 2 pictures with a side of less than 16 px" in caplog.text


def test_folders_that_are_named_after_no_label_are_told(labelled: Path, caplog: pytest.LogCaptureFixture) -> None:
    (labelled / "hase").mkdir()
    (labelled / ".thumbnails").mkdir()
    assert list(figures.pictures(labelled, per_label=1))
    assert f"left out folders of {labelled} that are named after no label: hase; the labels are noise" in caplog.text
    caplog.clear()
    for label in ("noise", "rain", "clean"):
        shutil.rmtree(labelled / label, ignore_errors=True)
    with pytest.raises(UsageError, match="no photograph in"):
        next(figures.pictures(labelled, per_label=1))
    assert "no label: hase;" in caplog.text


def test_a_library_that_logs_by_itself_changes_no_line(labelled: Path, tmp_path: Path) -> None:
    """As open_clip does while it loads weights."""
    (labelled / "hase").mkdir()
    model, classifier = write_tiny_model(tmp_path / "m.safetensors"), write_tiny_classifier(tmp_path / "c.safetensors")
    script = (
        "import logging\nfrom jobs import cli, networks\nload = networks.load_networks\n"
        "networks.load_networks = lambda options: (logging.info('of mine'), load(options))[1]\ncli.main()"
    )
    weights = ["--model", str(model), "--classifier", str(classifier), "--per-label", "1"]
    command = [sys.executable, "-c", script, "figures", str(labelled), str(tmp_path / "out"), *weights]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("left out folders of ")


def test_too_few_pictures_for_a_map_of_features_are_told(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_tiny_model(tmp_path / "m.safetensors")
    found = list(figures.pictures(labelled, per_label=1))
    drawn = figures.draw(found, load_restorer(model), Oracle(Degradation.RAIN), load_checkpoint(model))
    assert set(drawn) == {"confusion", "reliability", "before-after"}
    assert "t-SNE needs more than 3 pictures, not all alike, and 2 can be used" in caplog.text


def test_pictures_are_read_one_at_a_time(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(figures, "as_restored", lambda path: read.append(path) or data.coffee()[:64, :64])
    found = figures.pictures(labelled, per_label=9)
    for count in (1, 2):
        next(found)
        assert len(read) == count


def test_clean_photographs_are_degraded_under_every_label(tmp_path: Path) -> None:
    for number in range(3):
        pixels = np.roll(data.astronaut(), 90 * number, axis=0)[:300, :300]
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    first, again = (list(figures.pictures(tmp_path, per_label=2)) for _ in range(2))
    assert [picture.label for picture in first] == [label for label in LABELS for _ in range(2)]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
    with pytest.raises(UsageError, match="is not a folder"):
        next(figures.pictures(tmp_path / "none", per_label=2))


def test_pictures_that_are_all_alike_have_no_map_of_features(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their spread, which t-SNE divides by, is zero: it ended the process."""
    model = write_tiny_model(tmp_path / "m.safetensors")
    found = [figures.Labelled(data.astronaut()[:72, :80], Degradation.RAIN)] * 4
    drawn = figures.draw(found, load_restorer(model), Oracle(Degradation.RAIN), load_checkpoint(model))
    assert "latent" not in drawn
    assert "not all alike, and 4 can be used" in caplog.text
