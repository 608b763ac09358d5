import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from synthetic_classifier import write_tiny_classifier
from synthetic_clip import as_archive, small_clip
from synthetic_weights import write_tiny_model
from typer.testing import CliRunner

from classifier import load_classifier
from classifier.clip_classifier import CROPS, SENTENCES, ClipCalibration, ClipClassifier
from classifier.errors import ClassifierWeightsError
from classifier.labels import LABELS, Degradation
from classifier.view import ViewSettings, take_views
from jobs import calibrate_clip, networks, preview, restore
from jobs.calibrate_clip import fit_scaling
from jobs.cli import app
from jobs.errors import UsageError
from jobs.restore import _absolute
from models import load_restorer

SMALL = ClipCalibration(architecture="small-clip")


def pictures(folder, count):
    """Textured pictures of 170 x 200 px, as files."""
    folder.mkdir()
    for number in range(count):
        pixels = np.roll(data.astronaut(), 50 * number, axis=1)[100:270, 100:300]
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_likeness_is_that_of_clip_itself(tmp_path):
    open_clip, network, path = small_clip(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    views = take_views(image, ViewSettings(crop_px=32, crops=CROPS, thumbnail_px=32))
    settings = open_clip.get_model_preprocess_cfg(network)
    mean, std = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
    with torch.no_grad():
        pixels = torch.from_numpy(np.concatenate([views.thumbnail[None], views.crops])).float() / 255
        seen = network.encode_image(((pixels - mean) / std).permute(0, 3, 1, 2), normalize=True)
        expected = []
        for label in LABELS:
            words = network.encode_text(open_clip.tokenize(list(SENTENCES[label])), normalize=True).mean(dim=0)
            similarity = network.logit_scale.exp() * seen @ F.normalize(words, dim=0)
            expected.append(float(similarity[0] / 2 + similarity[1:].mean() / 2))
    classifier = ClipClassifier(path, calibration=SMALL)
    np.testing.assert_allclose(classifier.logits(classifier.take_views(image)), expected, atol=1e-4)


def test_predictions_are_consistent_and_uncalibrated_damage_needs_the_highest_threshold(tmp_path):
    _, _, path = small_clip(tmp_path)
    SMALL.write(path)
    classifier = load_classifier(f"clip:{path}")
    images = [np.full((1, 1, 3), 9, np.uint8), np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)]
    batch = classifier.predict(images)
    assert batch == [classifier.predict([image])[0] for image in images]
    for prediction in batch:
        assert list(prediction.probabilities) == list(LABELS)
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
    thresholds = ClipCalibration().thresholds
    assert {label for label in LABELS if thresholds[label] >= 0.8} == set(LABELS) - {"clean", "other"}
    with pytest.raises(ValueError, match="H x W x 3 uint8"):
        classifier.predict([np.zeros((4, 4), np.uint8)])


def test_bias_temperature_and_thresholds_are_used(tmp_path):
    _, _, path = small_clip(tmp_path)
    image = np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    plain = ClipClassifier(path, calibration=SMALL)
    pushed = ClipCalibration(
        architecture="small-clip",
        temperature=2.0,
        bias=dict.fromkeys(LABELS, 0.0) | {Degradation.HAZE: 100.0},
        thresholds=dict.fromkeys(LABELS, 0.99),
    )
    pushed.write(path)
    classifier = load_classifier(f"clip:{path}")
    logits = plain.logits(plain.take_views(image)) / 2
    logits[LABELS.index(Degradation.HAZE)] += 50
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    (prediction,) = classifier.predict([image])
    np.testing.assert_allclose(list(prediction.probabilities.values()), expected, atol=1e-9)
    assert (prediction.label, prediction.confident) == (Degradation.HAZE, True)
    assert classifier.sha256 != plain.sha256


def test_faults_of_the_weights_are_named(tmp_path):
    _, _, path = small_clip(tmp_path)
    with pytest.raises(ClassifierWeightsError, match="no such file"):
        load_classifier(f"clip:{tmp_path / 'absent.pt'}")
    for folder in (str(tmp_path), ""):
        with pytest.raises(ClassifierWeightsError, match="is a folder; name the file of CLIP weights"):
            load_classifier(f"clip:{folder}")
    with pytest.raises(ClassifierWeightsError, match="cannot be loaded as CLIP ViT-B-32-quickgelu"):
        load_classifier(f"clip:{path}")
    card = SMALL.write(path)
    card.write_text(card.read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(ClassifierWeightsError, match="belongs to other weights"):
        load_classifier(f"clip:{path}")
    for change, said in (
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"temperature": float("nan")}, "temperature is above 0"),
        ({"thresholds": dict.fromkeys(LABELS, 1.1)}, "thresholds are from 0 to 1"),
        ({"bias": dict.fromkeys(LABELS, float("nan"))}, "bias is not finite"),
    ):
        card = replace(SMALL, **change).write(path)
        with pytest.raises(ClassifierWeightsError, match=said):
            load_classifier(f"clip:{path}")
    whole = json.loads(SMALL.write(path).read_text())
    for change, said in (({"temperature": None}, "it lacks temperature"), ({"quality": 3}, "its quality is 3")):
        content = {name: value for name, value in (whole | change).items() if value is not None}
        card.write_text(json.dumps(content))
        with pytest.raises(ClassifierWeightsError, match=said):
            load_classifier(f"clip:{path}")
    card.write_text("[]")
    with pytest.raises(ClassifierWeightsError, match=r"is no calibration of clip\.pt"):
        load_classifier(f"clip:{path}")


def test_an_archive_as_openai_publishes_them_predicts_the_same(tmp_path):
    _, network, path = small_clip(tmp_path)
    image = np.random.default_rng(2).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    files = (path, as_archive(network, tmp_path / "archive.pt"))
    plain, archive = (ClipClassifier(file, calibration=SMALL).predict([image])[0] for file in files)
    assert plain == archive


CAPTIONS = {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1, "attn_pooler_heads": 1}


@pytest.mark.parametrize(
    ("vision", "text", "changes"),
    [
        ({"layers": [1, 1, 1, 1], "image_size": 64, "patch_size": None}, {}, {}),
        ({}, {}, {"custom_text": True, "init_logit_bias": -10}),
        (
            {"attentional_pool": True, "attn_pooler_heads": 1, "output_tokens": True},
            {"context_length": 76, "embed_cls": True, "output_tokens": True},
            {"multimodal_cfg": CAPTIONS, "custom_text": True},
        ),
    ],
    ids=["resnet", "siglip", "coca"],
)
def test_other_models_of_open_clip_are_asked_as_clip_is(tmp_path, vision, text, changes):
    _, network, path = small_clip(tmp_path, "other-clip", vision, text, embed_dim=64, **changes)
    classifier = ClipClassifier(path, calibration=ClipCalibration(architecture="other-clip"))
    views = classifier.take_views(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    with torch.no_grad():
        pixels = torch.from_numpy(np.concatenate([views.thumbnail[None], views.crops])).float() / 255
        normal = (pixels.permute(0, 3, 1, 2) - classifier._mean) / classifier._std
        likeness = network.encode_image(normal, normalize=True) @ classifier._directions.T
    np.testing.assert_allclose(classifier.logits(views), likeness[0] / 2 + likeness[1:].mean(0) / 2, atol=1e-4)


def test_a_model_that_cannot_be_asked_is_refused_before_the_run(tmp_path):
    _, network, path = small_clip(tmp_path, "wide-clip", {"image_size": [32, 64]})
    wide, words = ClipCalibration(architecture="wide-clip"), ClipCalibration(architecture="words-clip")
    with pytest.raises(ClassifierWeightsError, match="sees pictures of 32 x 64 px; square ones are needed"):
        ClipClassifier(path, calibration=wide)
    _, _, path = small_clip(tmp_path, "words-clip", text={"hf_tokenizer_name": "nowhere/at-all"})
    with pytest.raises(ClassifierWeightsError, match=r"CLIP words-clip"):  # for want of transformers, or the network
        ClipClassifier(path, calibration=words)
    _, network, path = small_clip(tmp_path)
    torch.nn.init.constant_(network.visual.proj, torch.nan)
    torch.save(network.state_dict(), path)
    with pytest.raises(ClassifierWeightsError, match="weights are not finite"):
        ClipClassifier(path, calibration=SMALL)


def test_scaling_recovers_the_temperature_and_bias_that_spoilt_logits():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=20_000)
    honest = rng.normal(0, 1, (len(labels), 4))
    shares = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    labels = (rng.random((len(labels), 1)) > shares.cumsum(axis=1)).sum(axis=1)
    bias = np.array([0.0, 5.0, -3.0, 1.0])
    temperature, found = fit_scaling(honest * 7 - bias, labels)
    assert temperature == pytest.approx(7, rel=0.05)
    np.testing.assert_allclose(found - found[0], bias, atol=0.4)


@pytest.fixture
def seeing(monkeypatch):
    """CLIP that recognises most labels: a sample of each is of one brightness."""
    rng = np.random.default_rng(0)

    def likeness(_, views):
        found = rng.normal(0, 1, len(LABELS))
        found[int(views.thumbnail.mean() / 255 * len(LABELS))] += 4
        return found

    def painted(_, label, __):
        return np.full((60, 60, 3), (LABELS.index(label) + 0.5) / len(LABELS), np.float32)

    monkeypatch.setattr(ClipClassifier, "logits", likeness)
    monkeypatch.setattr(calibrate_clip, "draw_damaged", painted)


def test_clip_that_tells_nothing_apart_is_not_calibrated(tmp_path, refuses):
    _, _, path = small_clip(tmp_path)
    command = [str(path), str(pictures(tmp_path / "photographs", 2)), "--architecture", "small-clip", "--device", "cpu"]
    with refuses(r"40\.0% are right, no more than if it always said clean \(temperature"):
        calibrate_clip.main([*command, "--samples", "42"])
    assert not ClipCalibration.path(path).exists()


@pytest.mark.usefixtures("seeing")
def test_clip_is_calibrated_on_photographs_and_then_previews_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the preview goes
    _, _, path = small_clip(tmp_path)
    folder = pictures(tmp_path / "photographs", 3)
    calibrate_clip.main([str(path), str(folder), "--architecture", "small-clip", "--samples", "56", "--device", "cpu"])
    assert "calibration_error" in capsys.readouterr().out
    card = json.loads(ClipCalibration.path(path).read_text())
    assert card["quality"]["samples"] == 28
    assert card["temperature"] > 0
    model = write_tiny_model(tmp_path / "model.safetensors")
    options = ["--model", str(model), "--classifier", f"clip:{path}", "--device", "cpu", "--dtype", "float32"]
    done = CliRunner().invoke(app, ["preview", str(folder / "0.png"), *options])
    assert done.exit_code == 0, done.output
    assert "estimated noise" in done.output


def test_a_run_tells_that_clip_is_not_calibrated_before_it_starts(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise UsageError("it starts")

    monkeypatch.setattr(restore, "run", stop)
    monkeypatch.setattr(restore, "classifier_sha256", lambda _: "0" * 64)
    path = tmp_path / "clip.pt"
    path.touch()
    model = write_tiny_model(tmp_path / "model.safetensors")
    folder = pictures(tmp_path / "photographs", 1)
    options = ["--model", str(model), "--classifier", f"clip:{path}", "--device", "cpu", "--engine", "local"]
    for out, told in (("first", True), ("second", False)):
        done = CliRunner().invoke(app, ["restore", str(folder), str(tmp_path / out), *options])
        before, started, _ = done.stderr.partition("it starts")
        assert started
        assert ("not calibrated: most images will be left alone" in before) is told
        SMALL.write(path)


def test_other_commands_tell_that_clip_is_not_calibrated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the preview goes
    path = tmp_path / "clip.pt"
    path.touch()
    model = load_restorer(write_tiny_model(tmp_path / "model.safetensors"))
    classifier = load_classifier(write_tiny_classifier(tmp_path / "c.safetensors"))
    for module in (networks, preview):
        monkeypatch.setattr(module, "load_networks", lambda _: (model, classifier))
    (tmp_path / "labels").mkdir()
    for folder in ("degraded", "reference", "labels/rain"):
        pictures(tmp_path / folder, 1)
    options = ["--model", str(tmp_path / "model.safetensors"), "--classifier", f"clip:{path}", "--device", "cpu"]
    told = {}
    for command in (
        ["preview", "degraded/0.png"],
        ["evaluate", "--dataset", "pairs", "--label", "haze", "--root", "."],
        ["figures", "labels", "out"],
    ):
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 0, done.output
        told[command[0]] = f"note: clip:{path}, not calibrated: most images will" in done.output
    assert told == {"preview": True, "evaluate": True, "figures": True}
    SMALL.write(path)
    done = CliRunner().invoke(app, ["preview", "degraded/0.png", *options])
    assert (done.exit_code, "not calibrated" in done.output) == (0, False)


def test_workers_find_weights_by_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clip.pt").touch()
    assert _absolute("clip:clip.pt") == f"clip:{tmp_path / 'clip.pt'}"
    assert _absolute("clip.pt") == str(tmp_path / "clip.pt")
    assert _absolute("degradation-small") == "degradation-small"


def test_calibration_tells_wrong_paths_without_a_traceback(tmp_path, refuses):
    _, _, path = small_clip(tmp_path)
    settings = ["--architecture", "small-clip", "--device", "cpu"]
    for arguments, said in (
        ([tmp_path / "none.pt", tmp_path], "none.pt: no such file"),
        ([path, tmp_path / "nowhere"], "nowhere is not a folder"),
    ):
        with refuses(said):
            calibrate_clip.main([*map(str, arguments), *settings])
    for samples in ("-4", "0", "2", "41"):
        with refuses(f"--samples {samples}: a calibration needs 42 or more"):
            calibrate_clip.main([str(path), str(tmp_path), *settings, "--samples", samples])


def test_places_are_looked_at_before_clip_is_loaded(tmp_path, monkeypatch, refuses):
    _, _, path = small_clip(tmp_path)
    monkeypatch.setattr(calibrate_clip, "ClipClassifier", None)
    with refuses("nowhere is not a folder"):
        calibrate_clip.main([str(path), str(tmp_path / "nowhere"), "--device", "cpu"])
    ClipCalibration.path(path).mkdir()
    with refuses(r"clip\.pt\.dfpir\.json cannot be read or written: Is a directory"):
        calibrate_clip.main([str(path), str(tmp_path), "--device", "cpu"])
    with refuses("is a folder; name the file of CLIP weights"):
        calibrate_clip.main([str(tmp_path), str(tmp_path), "--device", "cpu"])


@pytest.mark.usefixtures("seeing")
def test_the_fewest_samples_give_a_calibration_that_can_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich: as on a terminal
    _, _, path = small_clip(tmp_path)
    folder = pictures(tmp_path / "photographs", 2)
    calibrate_clip.main([str(path), str(folder), "--architecture", "small-clip", "--samples", "42", "--device", "cpu"])
    printed = capsys.readouterr()
    assert "calibration " in printed.err
    assert "calibration " not in printed.out
    quality = load_classifier(f"clip:{path}").calibration.quality
    assert quality["samples"] == 21
    assert set(quality["confident_recall"]) == {str(label) for label in LABELS}
