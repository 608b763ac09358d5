import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_classifier import TINY

from classifier import load_classifier
from classifier.calibration import prior_weights
from classifier.labels import LABELS, Degradation
from classifier.network import DegradationNetwork
from classifier.view import ViewSettings
from jobs import classifier_samples, train_classifier, training_diary
from jobs.classifier_samples import (
    FAINTEST,
    SHARES,
    Pool,
    Synthesis,
    as_batch,
    as_filed,
    damage,
    draw_damaged,
    draw_labelled,
    draw_scene,
    vary_tone,
)
from jobs.errors import InterruptedBySignalError, TrainingError, UsageError
from jobs.export_classifier import all_hidden, all_logits, export, fit_small_output
from jobs.train_classifier import Training, blended, main, train
from jobs.training_config import ClassifierTraining, ConfigError, Data
from jobs.training_data import Photographs, is_validation
from jobs.training_loop import mixed_precision
from jobs.training_state import CHECKPOINT, PORTABLE
from pipeline.point_spread import smooth_field

# With views of 32 or 64 px the last strided convolution ends at 1 x 1, for which oneDNN's bfloat16 weight gradient
# holds uninitialised memory.
SMALL_VIEW = ViewSettings(crop_px=80, crops=2, thumbnail_px=80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty textured pictures, some of which fall into the validation split."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(40):
        rng = np.random.default_rng(number)
        shading = np.stack([smooth_field(200, 240, rng) for _ in range(3)], axis=2)
        pixels = 40 + 150 * shading + rng.integers(0, 40, (200, 240, 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"photo-{number}.png")
    assert {is_validation(f"photo-{number}.png") for number in range(40)} == {True, False}
    return folder


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(train_classifier, "VIEW", SMALL_VIEW)


def small(folder, **more):
    options = {"batch": 4, "pool": 12, "first_fill": 8, "fresh": 2, "validation_samples": 42, "network": TINY}
    return ClassifierTraining(data=Data(clean=(folder,)), weight_decay=0.02, **(options | more))


# Samples

SEEN = {Degradation.HAZE, Degradation.CLEAN, Degradation.RAIN}


def _grey(level):
    return np.full((170, 180, 3), level / 255, np.float32)


def test_scenes_lie_within_the_sizes_promised(folder):
    small = Photographs.clean([folder]).part(validation=False)
    rng = np.random.default_rng(0)
    large = Photographs(("large.png",), ((rng.integers(0, 256, (700, 800, 3), dtype=np.uint8),),))
    scenes = [draw_scene(photographs, rng) for photographs in (small, large) for _ in range(60)]
    for scene in scenes:
        assert min(scene.shape[:2]) >= 160
        assert scene.dtype == np.float32
        assert 0 <= scene.min() <= scene.max() <= 1
    assert len({scene.shape for scene in scenes[60:]}) > 10


def test_a_changed_tone_keeps_the_shapes(folder):
    scene = draw_scene(Photographs.clean([folder]).part(validation=False), np.random.default_rng(0))
    versions = [vary_tone(scene, np.random.default_rng(seed)) for seed in range(30)]
    assert sum(not np.array_equal(version, scene) for version in versions) > 20
    for version in versions:
        assert 0 <= version.min() <= version.max() <= 1
        assert np.corrcoef(version.mean(axis=2).ravel(), scene.mean(axis=2).ravel())[0, 1] > 0.8


@pytest.fixture
def dark_and_bright(monkeypatch):
    """One dark and three bright photographs, which damage leaves as they are."""
    levels = (20, 200, 200, 200)
    monkeypatch.setattr(classifier_samples, "damage", lambda image, label, rng: image)
    monkeypatch.setattr(classifier_samples, "vary_clean", lambda image, rng: image)
    monkeypatch.setattr(classifier_samples, "FAINTEST", {})
    return Photographs(("a.png",) * 4, tuple((np.full((170, 180, 3), level, np.uint8),) for level in levels))


def test_a_training_has_more_dark_subjects_where_light_is_not_what_is_missing(dark_and_bright, monkeypatch):
    monkeypatch.setattr(classifier_samples, "vary_tone", lambda scene, rng: scene)
    shares = {}
    for label in (Degradation.NOISE, Degradation.CLEAN, Degradation.LOWLIGHT):
        rng = np.random.default_rng(0)
        drawn = [draw_damaged(dark_and_bright, label, rng, training=True).mean() < 0.5 for _ in range(400)]
        shares[label] = np.mean(drawn)
    assert 0.2 < shares[Degradation.LOWLIGHT] < 0.3  # as among the photographs
    assert 0.31 < shares[Degradation.CLEAN] < 0.41  # 0.75 * 0.25 + 0.25 * (1 - 0.75 ** 4)
    assert 0.31 < shares[Degradation.NOISE] < 0.41


def test_calibration_sees_scenes_as_they_were_taken(dark_and_bright):
    rng = np.random.default_rng(0)
    drawn = [draw_damaged(dark_and_bright, Degradation.CLEAN, rng) for _ in range(400)]
    assert {round(255 * float(value)) for scene in drawn for value in (scene.min(), scene.max())} == {20, 200}
    assert 0.2 < np.mean([scene.mean() < 0.5 for scene in drawn]) < 0.3


def test_damage_too_faint_to_be_seen_is_drawn_again(folder, monkeypatch):
    photographs = Photographs.clean([folder]).part(validation=False)
    drawn = []

    def faint_at_first(image, label, rng):
        drawn.append(image + (0.5 if len(drawn) == 2 else 0.1) * np.float32(FAINTEST[label]) * 3)
        return drawn[-1]

    monkeypatch.setattr(classifier_samples, "damage", faint_at_first)
    monkeypatch.setattr(classifier_samples, "SHRINKABLE", set())
    damaged = draw_damaged(photographs, Degradation.RAIN, np.random.default_rng(0))
    assert len(drawn) == 3
    assert damaged is drawn[2]


def test_photographs_that_show_no_damage_are_refused(monkeypatch):
    blank = Photographs(("blank.png",), ((np.full((170, 180, 3), 128, np.uint8),),))
    monkeypatch.setattr(classifier_samples, "damage", lambda image, label, rng: image)
    with pytest.raises(ValueError, match="blur shows on none of the photographs"):
        draw_damaged(blank, Degradation.BLUR, np.random.default_rng(0))


def test_labelled_images_are_seen_as_they_are_and_as_often_as_promised(monkeypatch):
    def photograph(level, name):
        return Photographs((name,), ((np.full((170, 180, 3), level, np.uint8),),))

    monkeypatch.setattr(classifier_samples, "draw_damaged", lambda photographs, *rest, **more: _grey(200))
    monkeypatch.setattr(classifier_samples, "LABELLED_WEIGHT", 3)
    monkeypatch.setattr(classifier_samples, "SHARES", {label: float(label in SEEN) for label in LABELS})
    labelled = {Degradation.HAZE: photograph(60, "fog.png"), Degradation.CLEAN: photograph(120, "drawing.png")}
    synthesis = Synthesis(photograph(0, "a.png"), labelled, seed=0, view=SMALL_VIEW, training=False)
    samples = synthesis[range(1, 401)]
    for label, expected in (Degradation.HAZE, 1 / 4), (Degradation.CLEAN, 1 / 2), (Degradation.RAIN, 0):
        of_label = samples[samples["label"] == LABELS.index(label)]
        known = of_label["thumbnail"].mean(axis=(1, 2, 3)) < 180
        assert abs(known.mean() - expected) < 0.1, label
        assert len(of_label) > 100


def test_a_labelled_image_is_seen_whole_unless_it_is_clean(monkeypatch):
    monkeypatch.setattr(classifier_samples, "vary_clean", lambda image, rng: image)
    ramp = np.linspace(0, 255, 400, dtype=np.uint8)[None, :, None] + np.zeros((320, 1, 3), np.uint8)
    fog = Photographs(("fog.png",), ((ramp,),))
    rng = np.random.default_rng(0)
    spans = {
        label: [np.ptp(draw_labelled(fog, label, rng)) for _ in range(40)]
        for label in (Degradation.HAZE, Degradation.CLEAN)
    }
    assert min(spans[Degradation.HAZE]) > 0.98
    assert min(spans[Degradation.CLEAN]) < 0.9


@pytest.mark.parametrize("training", [False, True])
def test_labelled_damage_that_fades_is_never_made_smaller_or_softer(training):
    """Of noise of sigma 25 on 1,500 px a side a reduced picture kept a fifth, which is clean."""
    noise = np.random.default_rng(0).normal(0, 25, (1500, 1600, 3))
    noisy = Photographs(("noisy.png",), ((np.rint(np.clip(120 + noise, 0, 255)).astype(np.uint8),),))
    rng = np.random.default_rng(0)
    for _ in range(30):
        image = draw_labelled(noisy, Degradation.NOISE, rng, training=training)
        assert max(image.shape[:2]) <= 512
        colours = image.std(axis=(0, 1)).max() if training else image.std(axis=(0, 1)).min()  # a tone may pale some
        assert 255 * colours > (10 if training else 24)


def test_small_photographs_are_not_enlarged():
    """A clean one would be damaged thereby: `CleanLimits.scale`."""
    photograph = np.random.default_rng(0).integers(0, 256, (200, 230, 3), dtype=np.uint8)
    small = Photographs(("small.png",), ((photograph,),))
    for whole in (False, True):
        rng = np.random.default_rng(0)
        scenes = [draw_scene(small, rng, whole=whole) for _ in range(40)]
        assert max(side for scene in scenes for side in scene.shape[:2]) <= 230


@pytest.mark.parametrize("label", LABELS)
def test_damage_repeats_with_the_seed(label):
    image = np.random.default_rng(0).random((64, 80, 3), dtype=np.float32)
    first, second = (damage(image, label, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == image.shape


def test_filed_images_stay_close_to_what_was_given():
    image = np.stack([smooth_field(80, 90, np.random.default_rng(c)) for c in range(3)], axis=2)
    for seed in range(10):
        filed = as_filed(image, np.random.default_rng(seed))
        assert filed.dtype == np.uint8
        assert np.abs(filed / 255 - image).mean() < 0.02


def test_a_sample_depends_on_seed_and_number_alone(folder):
    synthesis = Synthesis(Photographs.clean([folder]).part(validation=False), seed=3, view=SMALL_VIEW, training=True)
    three, second = synthesis[range(1, 4)], synthesis[[2]]
    assert three["number"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(three[1:2], second)
    assert not np.array_equal(three[0]["crops"], three[1]["crops"])
    crops, thumbnails, labels = as_batch(three)
    assert crops.shape == (3, 2, 3, 80, 80)
    assert thumbnails.shape == (3, 3, 80, 80)
    assert labels.tolist() == three["label"].tolist()


def test_small_samples_are_small_and_as_damaged_as_large_ones(folder):
    photographs = Photographs.clean([folder]).part(validation=False)
    for label in LABELS:
        for seed in range(8):
            drawn = draw_damaged(photographs, label, np.random.default_rng(seed), training=True, below_px=48)
            assert 23 <= min(drawn.shape[:2]) < 48
            assert max(drawn.shape[:2]) < 4 * 48


def test_the_layer_for_small_images_learns_from_them_and_nothing_else_moves(folder):
    photographs = Photographs.clean([folder]).part(validation=False)
    samples = Synthesis(photographs, seed=3, view=SMALL_VIEW, training=True, small=True)[range(1, 81)]
    torch.manual_seed(0)
    network = DegradationNetwork(TINY, crop_px=SMALL_VIEW.crop_px).requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fit_small_output(network, samples, temperature=1.5)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    hidden, labels = all_hidden(network, samples)
    weights = torch.from_numpy(prior_weights(SHARES)).float()[labels]

    def cost(logits):
        return float((weights * torch.nn.functional.cross_entropy(logits / 1.5, labels, reduction="none")).mean())

    fitted = cost(network.small_output(hidden))
    assert fitted < cost(network.output(hidden)) - 0.05
    network.small_output.bias[0] += 0.3  # at an optimum every way leads up
    assert cost(network.small_output(hidden)) > fitted
    network.small_output.bias[0] -= 0.6
    assert cost(network.small_output(hidden)) > fitted


def test_the_pool_holds_the_newest_and_knows_what_it_lacks(folder, tmp_path):
    synthesis = Synthesis(Photographs.clean([folder]).part(validation=False), seed=0, view=SMALL_VIEW, training=True)
    pool = Pool(tmp_path / "pool", 4, SMALL_VIEW)
    assert pool.missing(3) == [1, 2, 3]
    made = synthesis[range(1, 7)]
    pool.add(made)
    assert pool.missing(6) == []
    again = Pool(tmp_path / "pool", 4, SMALL_VIEW)
    assert again.missing(6) == []
    assert again.missing(5) == [2]  # which the sixth has overwritten
    drawn = again.draw(np.random.default_rng(0), newest=6, count=40)
    assert set(drawn["number"].tolist()) == {3, 4, 5, 6}
    for sample in drawn:
        np.testing.assert_array_equal(sample, made[sample["number"] - 1])
    assert Pool(tmp_path / "pool", 5, SMALL_VIEW).missing(2) == [1, 2]


def test_a_pool_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(classifier_samples.os, "posix_fallocate", full)
    with pytest.raises(TrainingError, match=r"0\.2 GB for samples cannot be had: .*No space left"):
        Pool(tmp_path / "pool", 4000, SMALL_VIEW)
    assert not (tmp_path / "pool").exists()


def test_every_label_has_a_share():
    assert set(SHARES) == set(LABELS)
    assert sum(SHARES.values()) == pytest.approx(1)
    assert max(SHARES, key=SHARES.__getitem__) is Degradation.CLEAN


# Training


def test_the_learning_rate_warms_up_and_ends_low(folder):
    config = small(folder, steps=1, learning_rate=1.0)
    rates = [config.learning_rate_at(progress) for progress in np.linspace(0, 1, 201).tolist()]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(0.01)
    long = replace(config, warm_up=0.3)
    rates = [long.learning_rate_at(progress) for progress in (0, 0.15, 0.2999, 0.3, 0.65, 1)]
    assert rates == pytest.approx([0.01, 0.505, 1, 1, 0.505, 0.01], abs=1e-3)
    assert all(math.isfinite(rate) and type(rate) is float for rate in rates)


@pytest.fixture
def stopped(folder, tmp_path, tiny):
    """A training of five steps, killed in its fifth, with a checkpoint of its third and a pool that is ahead of it."""
    learn, keep, out = Training.learn, Training.save, tmp_path / "out"

    def until_the_fifth(self):
        if self.step == 4:
            raise KeyboardInterrupt
        return learn(self)

    def at_the_third(self):
        if self.step == 3:
            keep(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "learn", until_the_fifth)
        patch.setattr(Training, "save", at_the_third)
        patch.setattr("jobs.training_loop.SAVE_EVERY_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(small(folder, steps=5), out, threads=1)
    assert torch.load(out / CHECKPOINT, weights_only=True)["step"] == 3
    return out


def test_a_training_goes_on_to_the_bit_where_it_was_killed(folder, tmp_path, stopped):
    config = small(folder, steps=5)
    train(config, tmp_path / "whole", threads=1)
    pool = Pool(stopped / "pool", config.pool, SMALL_VIEW)
    assert pool.missing(14) == [3, 4]  # overwritten by the fourth step's
    pool.samples["crops"][::3] = 0
    pool.samples["number"][::3] = 0  # half written
    assert 4 < len(pool.missing(14)) < 10
    train(config, stopped, threads=1, loaders=1)
    first, second = (torch.load(out / CHECKPOINT, weights_only=True) for out in (tmp_path / "whole", stopped))
    assert first["step"] == second["step"] == 5
    for name in ("network", "average"):
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), key


def test_a_training_goes_on_elsewhere_from_its_portable_checkpoint(folder, tmp_path, stopped):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (stopped / PORTABLE).rename(elsewhere / PORTABLE)
    training = Training(small(folder, steps=5), elsewhere, torch.device("cpu"))
    assert training.step == 3
    stored = torch.load(stopped / CHECKPOINT, weights_only=True)["average"]
    for key, value in training.average.state_dict().items():
        torch.testing.assert_close(value, stored[key], rtol=1e-3, atol=1e-4)
    assert train(small(folder, steps=5), elsewhere, threads=1).step == 5


def test_a_checkpoint_that_cannot_be_taken_up_is_named(folder, stopped):
    state = torch.load(stopped / CHECKPOINT, weights_only=True)
    for spoilt in ({"weights": 3}, state | {"network": {}}, state | {"optimiser": {}}):
        torch.save(spoilt, stopped / CHECKPOINT)
        with pytest.raises(UsageError, match=r"checkpoint\.pt is damaged or no such checkpoint; move it away"):
            train(small(folder, steps=5), stopped, threads=1)


def test_a_training_writes_a_diary_and_exports_what_can_be_loaded(folder, tmp_path, stopped):
    weights = tmp_path / "own.safetensors"
    export(train(small(folder, steps=5), stopped, threads=1), weights, licence="CC0-1.0")
    assert "recall noise" in (stopped / "training.log").read_text()
    sheet = np.asarray(Image.open(stopped / "samples" / "step-0000005.png"))
    assert sheet.shape[1:] == (3 * SMALL_VIEW.crop_px, 3)
    assert list((stopped / "tensorboard").iterdir())
    assert weights.with_suffix(".json").exists()
    classifier = load_classifier(weights)
    assert classifier.weights.provenance["steps"] == 5
    average = torch.load(stopped / CHECKPOINT, weights_only=True)["average"]
    exported = classifier.weights.network.state_dict()
    assert {exported.pop(f"small_output.{name}").shape[0] for name in ("weight", "bias")} == {len(LABELS)}
    assert exported.keys() == average.keys()
    for key, value in exported.items():
        if key != "head.3.bias":  # holds the shares expected in use as well
            torch.testing.assert_close(value, average[key], rtol=2e-3, atol=1e-3)
    assert len(classifier.predict([np.zeros((20, 30, 3), np.uint8)])) == 1


@pytest.mark.usefixtures("tiny")
def test_an_export_replaces_its_own_trainings_files_alone(folder, tmp_path, refuses):
    """Through the command line, so that nothing is trained before the refusal."""
    config = tmp_path / "c.toml"
    config.write_text(
        f"steps = 1\npool = 8\nfirst_fill = 2\nfresh = 0\nbatch = 2\nvalidation_samples = 42\n"
        f'[data]\nclean = ["{folder}"]\n[network]\nstem_width = 8\ncrop_channels = [8, 8, 8, 8]\nhidden = 8\n'
        "thumbnail_channels = [8, 8, 8, 8]\nspectrum_channels = [8, 8]\n"
    )
    target = tmp_path / "own.safetensors"
    unlicensed = [str(config), str(tmp_path / "out"), "--device", "cpu", "--threads", "1", "--export", str(target)]
    with refuses("--export needs --licence"):
        main(unlicensed)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with refuses("--export: nothing can be written in .*file: File exists"):
        main([*unlicensed[:-1], str(tmp_path / "file" / "own.safetensors"), "--licence", "CC0-1.0"])
    assert not (tmp_path / "out").exists()
    with refuses("error: --threads is from 0 up, not -1"):
        main([*unlicensed, "--threads", "-1"])
    again = [*unlicensed, "--licence", "CC0-1.0"]
    main(again)
    assert load_classifier(target).weights.licence == "CC0-1.0"
    target.with_suffix(".json").write_text("{}")
    main(again)
    assert target.with_suffix(".json").read_text() != "{}"
    config.write_text("seed = 1\n" + config.read_text())
    other = [*again[:1], str(tmp_path / "other"), *again[2:]]
    with refuses(r"not of this training: .*own\.safetensors and .*own\.json; move it away"):
        main(other)
    target.unlink()
    with refuses(r"not of this training: .*own\.json; move it away"):
        main(other)
    assert not (tmp_path / "other").exists()


def test_a_diary_names_skipped_photographs_and_tells_that_others_are_there(folder, tmp_path, stopped):
    other = tmp_path / "photographs"
    shutil.copytree(folder, other)
    (other / "broken.png").write_bytes(b"no image")
    state = torch.load(stopped / CHECKPOINT, weights_only=True)
    state["config"]["data"]["clean"] = [str(other)]
    torch.save(state, stopped / CHECKPOINT)
    config = small(other, steps=5)
    train(config, stopped, threads=1)
    log = (stopped / "training.log").read_text()
    assert f"skipped a photograph: cannot read {other / 'broken.png'}" in log
    assert "are not those of the checkpoint" not in log
    state["inventory"] = "3 (names abc)"
    torch.save(state, stopped / CHECKPOINT)
    train(config, stopped, threads=1)
    assert "not those of the checkpoint: it had 3 (names abc), now" in (stopped / "training.log").read_text()


def test_a_gradient_that_is_no_number_ends_the_training_and_spares_the_checkpoint(folder, stopped, monkeypatch):
    before = (stopped / CHECKPOINT).read_bytes()
    monkeypatch.setattr(train_classifier.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * float("nan"))
    with pytest.raises(
        TrainingError, match=r"not finite at step 3, samples (\d+, ){3}\d+; last good checkpoint: .*out"
    ):
        train(small(folder, steps=5), stopped, threads=1)
    assert (stopped / CHECKPOINT).read_bytes() == before


@pytest.mark.usefixtures("tiny")
def test_a_call_without_time_keeps_what_it_made_and_a_finished_training_makes_nothing(folder, tmp_path, monkeypatch):
    config, out = small(folder, steps=2), tmp_path / "out"
    train(config, out, threads=1, max_minutes=0.0)
    assert Pool(out / "pool", config.pool, SMALL_VIEW).missing(8) == list(range(1, 9))
    assert torch.load(out / CHECKPOINT, weights_only=True)["step"] == 0
    assert train(config, out, threads=1).step == 2
    (out / "pool").unlink()
    monkeypatch.setattr(Training, "numbers", None)
    assert train(config, out, threads=1).step == 2


def test_loader_processes_end_with_a_training_that_is_killed(folder):
    """Their records are larger than a pipe: handed over through one, the last of them would wait for ever."""
    script = f"""
import os, sys, time
from pathlib import Path
from torch.utils.data import DataLoader
from classifier.view import ViewSettings
from jobs.classifier_samples import Synthesis
from jobs.train_classifier import _as_bytes
from jobs.training_data import Photographs
photographs = Photographs.clean([Path({str(folder)!r})]).part(validation=True)
made = Synthesis(photographs, seed=0, view=ViewSettings(), training=True)
loader = DataLoader(made, batch_size=None, sampler=[range(1, 9)] * 9, num_workers=1, collate_fn=_as_bytes)
coming = iter(loader)
next(coming)
print(coming._workers[0].pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    time.sleep(3)  # it makes what it may make ahead
    process.kill()
    process.wait()
    for _ in range(300):
        if not alive(worker):
            break
        time.sleep(0.1)
    assert not alive(worker)


def alive(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("tiny")
def test_another_configuration_is_refused_and_its_average_may_be_taken_up(folder, tmp_path):
    out = tmp_path / "out"
    train(small(folder, steps=1), out, threads=1)
    with pytest.raises(ConfigError, match="batch: was 4, is now 5"):
        train(small(folder, steps=1, batch=5), out, threads=1)
    other = small(folder, steps=1, batch=5, start_from=out / CHECKPOINT)
    taken = train(other, tmp_path / "other", threads=1, max_minutes=0.0)
    wanted = torch.load(out / CHECKPOINT, weights_only=True)["average"]
    assert all(torch.equal(value, wanted[key]) for key, value in taken.network.state_dict().items())


@pytest.mark.usefixtures("tiny")
def test_a_training_may_start_from_a_classifiers_weights(folder, tmp_path):
    """An export adds to the output bias how often labels are expected in use; a training takes it off again."""
    trained = train(small(folder, steps=2), tmp_path / "first", threads=1)
    export(trained, tmp_path / "first.safetensors", licence="CC0-1.0")
    again = small(folder, steps=1, start_from=tmp_path / "first.safetensors")
    taken = train(again, tmp_path / "again", threads=1, max_minutes=0.0)
    for name, value in taken.network.state_dict().items():
        half = 1e-3 * trained.network.state_dict()[name].abs() + 1e-6  # matrices are stored in float16
        assert ((value - trained.network.state_dict()[name]).abs() <= half).all(), name
    with pytest.raises(UsageError, match="start_from: no classifier 'nowhere'"):
        train(small(folder, steps=1, start_from=Path("nowhere")), tmp_path / "none", threads=1)
    with pytest.raises(UsageError, match="start_from degradation-small is of another network"):
        train(small(folder, steps=1, start_from=Path("degradation-small")), tmp_path / "none", threads=1)


# Teaching


def test_half_of_a_batch_is_blended():
    rng = np.random.default_rng(0)
    levels = torch.tensor([0.0, 40.0, 80.0, 120.0, 160.0, 200.0])
    crops = levels.view(6, 1, 1, 1, 1).expand(6, 2, 3, 4, 4)
    thumbnails = levels.view(6, 1, 1, 1).expand(6, 3, 4, 4)
    seen = set()
    for _ in range(40):
        mixed, small = blended(crops, thumbnails, rng)
        assert torch.equal(mixed[:, 0], small)  # all views of a sample alike
        assert torch.equal(mixed[3:], crops[3:])
        values = mixed[:3, 0, 0, 0, 0]
        assert torch.equal(mixed[:3], values.view(3, 1, 1, 1, 1).expand(3, 2, 3, 4, 4))
        assert torch.equal(values, values.round())
        seen.update(values.tolist())
    assert min(seen) < 10
    assert 150 < max(seen) <= 1.15 * 200
    assert len(seen) > 40


@pytest.mark.usefixtures("tiny")
def test_who_agrees_with_the_teacher_has_the_labels_to_learn(folder, tmp_path):
    train(small(folder, steps=1), tmp_path / "first", threads=1, max_minutes=0.0)
    first = train(small(folder, steps=1), tmp_path / "first", threads=1)
    export(first, tmp_path / "own.safetensors", licence="CC0-1.0")
    config = small(folder, steps=1, start_from=tmp_path / "own.safetensors", teacher=tmp_path / "own.safetensors")
    training = Training(config, tmp_path / "pupil", torch.device("cpu"))
    training.network.eval()  # without dropout, statistics of batches
    synthesis = Synthesis(Photographs.clean([folder]).part(validation=False), seed=0, view=SMALL_VIEW, training=True)
    crops, thumbnails, labels = as_batch(synthesis[range(1, 9)])
    with torch.no_grad():
        with mixed_precision(torch.device("cpu")):
            logits = training.network(crops, thumbnails).float()[4:]
        labels[4:] = logits.argmax(dim=1)
        labels[6:] = (labels[6:] + 1) % len(LABELS)  # the teacher is wrong here, and not followed
        loss = training.loss(crops, thumbnails, labels, np.random.default_rng(0))
        wrong = torch.nn.functional.cross_entropy(logits, labels[4:], label_smoothing=0.02, reduction="none")
        share = torch.tensor([0.4, 0.4, 1.0, 1.0])  # and agreed with already, on the half that is blended too
        assert float(loss) == pytest.approx(float((share * wrong).sum()) / 8, rel=1e-4)
        training.network.head[-1].bias[0] += 3
        assert training.loss(crops, thumbnails, labels, np.random.default_rng(0)) > 2 * loss


@pytest.mark.usefixtures("tiny")
def test_labelled_images_are_trained_on_beside_the_photographs(folder, tmp_path):
    fog = tmp_path / "fog"
    fog.mkdir()
    for number in range(3):
        (fog / f"photo-{number}.png").symlink_to(folder / f"photo-{number}.png")
    known = sum(not is_validation(f"photo-{number}.png") for number in range(3))
    config = small(folder, steps=1)
    config = replace(config, data=replace(config.data, labelled={Degradation.HAZE: (fog,)}))
    trained = train(config, tmp_path / "out", threads=1)
    assert trained.labelled == {Degradation.HAZE: known}
    export(trained, tmp_path / "own.safetensors", licence="CC0-1.0")
    assert load_classifier(str(tmp_path / "own.safetensors")).weights.provenance["labelled"] == f"haze {known}"


@pytest.mark.usefixtures("tiny")
def test_ctrl_c_while_the_pool_fills_ends_a_training_and_the_next_call_goes_on(folder, tmp_path):
    train(small(folder, steps=2), tmp_path / "whole", threads=1)
    add, added = Pool.add, []

    def add_and_interrupt(pool, samples):
        add(pool, samples)
        added.append(len(samples))
        if len(added) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "add", add_and_interrupt)
        with pytest.raises(InterruptedBySignalError, match="ended by SIGINT; the same command goes on"):
            train(small(folder, steps=2), tmp_path / "cut", threads=1)
    assert added == [2, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "add", lambda pool, samples: (added.append(len(samples)), add(pool, samples)))
        train(small(folder, steps=2), tmp_path / "cut", threads=1)
    assert sum(added) == 8 + 2 * 2  # none is made twice
    first, second = (torch.load(tmp_path / each / CHECKPOINT, weights_only=True) for each in ("whole", "cut"))
    assert all(torch.equal(first["average"][key], second["average"][key]) for key in first["average"])


@pytest.mark.usefixtures("tiny")
def test_a_pupil_learns_what_its_teacher_says(folder, tmp_path):
    """The teacher calls everything rain; no label does."""
    taught = train(small(folder, steps=1), tmp_path / "first", threads=1)
    with torch.no_grad():
        taught.network.head[-1].bias[LABELS.index(Degradation.RAIN)] += 6
    export(taught, tmp_path / "rain.safetensors", licence="CC0-1.0")
    options = {"steps": 25, "pool": 8, "fresh": 0, "batch": 8, "learning_rate": 2e-2}
    one_backbone = replace(TINY, thumbnail_channels=())
    config = small(folder, teacher=tmp_path / "rain.safetensors", **(options | {"network": one_backbone}))
    pupil = train(config, tmp_path / "pupil", threads=1)
    alone = train(small(folder, **options), tmp_path / "alone", threads=1)
    (tmp_path / "rain.safetensors").unlink()
    export(alone, tmp_path / "rain.safetensors", licence="CC0-1.0")
    with pytest.raises(UsageError, match=r"teacher .*rain\.safetensors has other weights than this training began"):
        train(config, tmp_path / "pupil", threads=1)
    shares = []
    for trained in (pupil, alone):
        logits, _ = all_logits(trained.network, trained.held_out)
        shares.append(float(logits.softmax(dim=1)[:, LABELS.index(Degradation.RAIN)].mean()))
    assert shares[0] > 0.6
    assert shares[1] < 0.4


@pytest.mark.usefixtures("tiny")
def test_a_network_too_large_for_memory_is_refused_before_it_is_made(folder, tmp_path):
    config = small(folder, steps=1, network=replace(TINY, hidden=10**12))
    with pytest.raises(UsageError, match=r"parameters takes .* GB to train, and cpu has .* GB free; choose a smaller"):
        train(config, tmp_path / "out", threads=1)


@pytest.mark.parametrize("backbone", ["nonsense", "vit_tiny_patch16_224", "hf-hub:timm/resnet10t.c3_in1k"])
def test_another_backbone_than_a_resnet_is_refused(folder, tmp_path, backbone):
    config = small(folder, steps=1, network=replace(TINY, backbone=backbone))
    with pytest.raises(ConfigError, match=f"backbone {backbone} is no ResNet"):
        train(config, tmp_path, threads=1)


@pytest.mark.usefixtures("tiny")
def test_a_teacher_that_cannot_teach_is_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="teacher: no classifier 'nowhere'"):
        train(small(folder, steps=1, teacher=Path("nowhere")), tmp_path / "none", threads=1)
    checkpoint = tmp_path / CHECKPOINT
    torch.save({"network": {}}, checkpoint)
    with pytest.raises(UsageError, match=r"teacher: .*checkpoint\.pt is not .*a training's checkpoint is exported by"):
        train(small(folder, steps=1, teacher=checkpoint), tmp_path / "none", threads=1)
    with pytest.raises(UsageError, match=r"teacher degradation-small sees .*96.*, this training .*80"):
        train(small(folder, steps=1, teacher=Path("degradation-small")), tmp_path / "none", threads=1)


@pytest.mark.usefixtures("tiny")
def test_a_few_steps_lower_the_loss(folder, tmp_path, caplog, monkeypatch):
    """On a pool that never changes, the network learns its samples by heart."""
    config = small(folder, steps=30, pool=8, first_fill=8, fresh=0, batch=8, learning_rate=2e-2)
    monkeypatch.setattr(training_diary, "LOG_EVERY", 10)
    with caplog.at_level("INFO"):
        train(config, tmp_path / "out", threads=1)
    losses = [float(r.getMessage().rsplit("loss ", 1)[1]) for r in caplog.records if "loss " in r.getMessage()]
    assert len(losses) == 3
    assert losses[2] < 0.8 * losses[0]
