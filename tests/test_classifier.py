import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from skimage import data
from synthetic_classifier import TINY, TINY_VIEW, write_tiny_classifier

from classifier import classifier_sha256, load_classifier
from classifier.architecture import Architecture
from classifier.errors import ClassifierWeightsError
from classifier.files import file_sha256
from classifier.labels import LABELS, Degradation
from classifier.network import (
    RESIDUAL_GAIN,
    DegradationNetwork,
    FinestPixels,
    PowerSpectrum,
    inference_form,
    to_input,
)
from classifier.timm_classifier import TimmClassifier
from classifier.view import ViewSettings
from classifier.weights import load_weights, save_classifier, write_card

SHIPPED = Path(__file__).parents[1] / "classifier" / "shipped" / "degradation-small.safetensors"
TEST_DATA = Path(__file__).parents[2] / "shared" / "data" / "test"


@pytest.fixture
def tiny(tmp_path):
    return write_tiny_classifier(tmp_path / "tiny.safetensors")


def random_images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(40, 70), (1, 1), (33, 32), (90, 5)]]


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118 (no mapping)


def rewritten(path, tensors, metadata):
    save_file(tensors, path, metadata=metadata)
    return path


# Predictions


def test_threads_that_predict_at_once_get_each_its_own(tiny, monkeypatch):
    classifier = load_classifier(tiny)
    images = random_images()
    alone = [classifier.predict([image]) for image in images]
    both = threading.Barrier(2, timeout=60)

    def to_input_once_both_are_here(pixels):
        both.wait()
        return to_input(pixels)

    monkeypatch.setattr("classifier.grouped.to_input", to_input_once_both_are_here)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda image: classifier.predict([image]), images))
    assert found == alone


def test_a_prediction_is_consistent(tiny):
    for prediction in load_classifier(tiny).predict(random_images()):
        values = sorted(prediction.probabilities.values())
        assert list(prediction.probabilities) == list(LABELS)
        assert sum(values) == pytest.approx(1)
        assert prediction.confidence == prediction.probabilities[prediction.label] == values[-1]
        assert prediction.margin == pytest.approx(values[-1] - values[-2])
        assert prediction.noise_sigma_255 >= 0


def test_a_batch_equals_singles_in_any_order(tiny):
    classifier = load_classifier(tiny)
    images = random_images()
    batch = classifier.predict(images)
    assert batch == [classifier.predict([image])[0] for image in images]
    assert batch[::-1] == classifier.predict(images[::-1])


def test_no_images_give_no_predictions(tiny):
    assert load_classifier(tiny).predict([]) == []


def test_other_arrays_are_refused(tiny):
    with pytest.raises(ValueError, match="H x W x 3 uint8"):
        load_classifier(tiny).predict([np.zeros((8, 8), np.uint8)])
    with pytest.raises(ValueError, match="NumPy array, found Image"):
        load_classifier(tiny).predict([Image.new("RGB", (8, 8))])


@pytest.mark.parametrize("dtype", [torch.float64, "bfloat16"])
def test_other_precisions_are_refused(tiny, dtype):
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        load_classifier(tiny, dtype=dtype)


def test_a_label_below_its_threshold_is_not_confident(tmp_path, tiny):
    image = random_images()[0]
    sure = load_classifier(tiny).predict([image])[0]
    thresholds = {**dict.fromkeys(LABELS, 0.0), sure.label: sure.confidence + 1e-6}
    weights = load_weights(tiny)
    path = tmp_path / "strict.safetensors"
    save_classifier(
        path, weights.network, view=TINY_VIEW, temperature=1.0, thresholds=thresholds, licence="", provenance={}
    )
    unsure = load_classifier(path).predict([image])[0]
    assert sure.confident
    assert unsure.label == sure.label
    assert not unsure.confident


def test_the_network_agrees_with_its_formula(tiny):
    """Mean and maximum over crops beside the thumbnail's features, then the head."""
    network = load_weights(tiny).network
    rng = np.random.default_rng(1)
    crops = to_input(torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)))
    thumbnails = to_input(torch.from_numpy(rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)))
    with torch.inference_mode():
        logits = network(crops, thumbnails)
        shuffled = network(crops[:, [2, 0, 1]], thumbnails)
        fewer = network(crops[:1, :1].expand(1, 3, -1, -1, -1), thumbnails[:1])
        alone = network(crops[:1, :1], thumbnails[:1])
    assert logits.shape == (2, len(LABELS))
    torch.testing.assert_close(logits, shuffled)
    torch.testing.assert_close(fewer, alone)


def test_a_thumbnail_goes_through_the_crops_backbone_or_its_own():
    crops, thumbnails = torch.rand(2, 3, 3, 32, 32) * 255, torch.rand(2, 3, 32, 32) * 255
    for own in ((), (8, 8, 8, 16)):
        network = DegradationNetwork(replace(TINY, thumbnail_channels=own), crop_px=32).eval()
        backbone = network.thumbnail_backbone if own else network.crop_backbone
        with torch.inference_mode():
            seen = network.crop_backbone(network.front(crops.flatten(0, 1))).view(2, 3, -1)
            whole = backbone(network.front(thumbnails))
            spectrum = network.spectrum_backbone(network.power_spectrum(crops))
            expected = network.head(torch.cat([seen.mean(dim=1), seen.amax(dim=1), whole, spectrum], dim=1))
            torch.testing.assert_close(network(crops, thumbnails), expected)
            rounded = inference_form(network, torch.bfloat16)
        assert {p.dtype for p in rounded.get_submodule("crop_backbone").parameters()} == {torch.bfloat16}
        assert (rounded.thumbnail_backbone is None) == (not own)


def test_small_images_have_a_last_layer_of_their_own(tiny, tmp_path):
    """All but the shapes beside it stay as they were, to the last digit."""
    plain = load_weights(tiny)
    network = plain.network
    network.small_output = torch.nn.Linear(TINY.hidden, len(LABELS))
    path = tmp_path / "two.safetensors"
    save_classifier(
        path, network, view=TINY_VIEW, temperature=1.0, thresholds=plain.thresholds, licence="", provenance={}
    )
    before, after = (load_classifier(each) for each in (tiny, path))
    images = random_images()
    for image, old, new in zip(images, before.predict(images), after.predict(images), strict=True):
        small = min(image.shape[:2]) < TINY_VIEW.crop_px
        assert (old.probabilities != new.probabilities) == small
        if small:
            views = after.take_views(image)
            hidden = network.hidden(
                *(to_input(torch.from_numpy(each)[None]) for each in (views.crops, views.thumbnail))
            )
            expected = network.small_output(hidden)[0].softmax(dim=0).tolist()
            assert [new.probabilities[label] for label in LABELS] == pytest.approx(expected, abs=2e-3)
    assert {min(image.shape[:2]) < TINY_VIEW.crop_px for image in images} == {True, False}
    assert after.predict(images[1:2])[0] == after.predict(images)[1]


@pytest.mark.parametrize("thumbnail_channels", [(), (8, 8, 8, 8)])
def test_bottlenecks_may_be_wider_than_their_channels(thumbnail_channels):
    shape = replace(TINY, backbone="resnet26d", thumbnail_channels=thumbnail_channels)
    network = DegradationNetwork(shape, crop_px=32).eval()
    views = torch.zeros(2, 3, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    assert network(*views).shape == (2, len(LABELS))
    torch.testing.assert_close(inference_form(network, torch.float32)(*views), network(*views), rtol=0, atol=1e-4)


def test_a_network_without_a_spectrum_is_refused_by_its_configuration():
    with pytest.raises(ValueError, match="spectrum_channels are one or more"):
        Architecture(spectrum_channels=())


def test_one_backbone_needs_views_of_one_size(tmp_path):
    path = tmp_path / "uneven.safetensors"
    view = ViewSettings(crop_px=32, crops=2, thumbnail_px=48)
    for own in ((8, 8, 8, 8), ()):
        network = DegradationNetwork(replace(TINY, thumbnail_channels=own), crop_px=32)
        thresholds = dict.fromkeys(LABELS, 0.0)
        save_classifier(path, network, view=view, temperature=1.0, thresholds=thresholds, licence="", provenance={})
        if own:
            assert load_weights(path).view == view
    with pytest.raises(ClassifierWeightsError, match="one backbone, but differ in size"):
        load_weights(path)


def test_the_front_is_colour_and_residual_of_every_pixel():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 8, 6)).astype(np.float32))
    residual = image - F.avg_pool2d(F.pad(image, (1, 1, 1, 1)), 3, stride=1)
    expected = [
        F.pixel_unshuffle(each, 2) for each in (image * 2 / 255 - 1, torch.tanh(residual * RESIDUAL_GAIN / 255))
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(FinestPixels()(image), torch.cat(expected, dim=1), atol=1e-5, rtol=1e-5)


# Weights


def test_saved_weights_come_back(tmp_path):
    torch.manual_seed(3)
    network = DegradationNetwork(TINY, crop_px=TINY_VIEW.crop_px).eval()
    thresholds = {label: 0.1 * index for index, label in enumerate(LABELS)}
    path = tmp_path / "own.safetensors"
    save_classifier(
        path, network, view=TINY_VIEW, temperature=1.3, thresholds=thresholds, licence="MIT", provenance={"steps": 4}
    )
    weights = load_weights(path)
    assert (weights.temperature, weights.licence, weights.provenance) == (1.3, "MIT", {"steps": 4})
    assert weights.thresholds == thresholds
    assert (weights.view, weights.network.architecture) == (TINY_VIEW, TINY)
    assert (weights.name, weights.sha256) == ("own", file_sha256(path))
    for name, tensor in weights.network.state_dict().items():
        torch.testing.assert_close(tensor, network.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_weights_may_be_read_by_whom_other_files_may(tiny, tmp_path):
    (tmp_path / "other").touch()
    assert tiny.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_matrices_are_stored_in_half_precision_and_vectors_in_full(tiny):
    tensors, _ = contents(tiny)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32), name


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(ClassifierWeightsError, match=r"no classifier 'no-such-thing'.*degradation-small"):
        load_classifier("no-such-thing")


def test_missing_and_unexpected_keys_and_shapes_are_named(tiny):
    tensors, metadata = contents(tiny)
    tensors["head.9.weight"] = tensors.pop("head.3.bias")
    tensors["head.1.bias"] = torch.zeros(5)
    with pytest.raises(ClassifierWeightsError) as caught:
        load_classifier(rewritten(tiny, tensors, metadata))
    message = str(caught.value)
    for part in ("tiny.safetensors", '"head.3.bias"', '"head.9.weight"', "mismatch for head.1.bias"):
        assert part in message


def test_weights_that_are_not_finite_are_refused(tiny):
    tensors, metadata = contents(tiny)
    tensors["head.1.bias"][0] = float("nan")
    with pytest.raises(ClassifierWeightsError, match=r"not finite: head\.1\.bias"):
        load_classifier(rewritten(tiny, tensors, metadata))


def test_another_architecture_is_refused(tiny):
    tensors, metadata = contents(tiny)
    description = json.loads(metadata["classifier"])
    description["architecture"]["hidden"] = 16
    metadata["classifier"] = json.dumps(description)
    with pytest.raises(ClassifierWeightsError, match=r"mismatch for head\.1\.bias"):
        load_classifier(rewritten(tiny, tensors, metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"backbone": "no_such_model"}}, "cannot be built"),
        ({"architecture": {"backbone": "hf-hub:timm/resnet10t.c3_in1k"}}, "cannot be built: timm has no model hf-hub"),
        ({"architecture": {"depth": 3}}, "cannot be built"),
        ({"architecture": {"backbone": None}}, "cannot be built"),
        ({"thresholds": {"noise": 0.5}}, "cannot be used"),
        ({"view": {"crops": 0}}, "cannot be used"),
        ({"labels": ["noise", "clean"]}, "trained for the labels"),
        ({"temperature": 0}, "a temperature is above 0, not 0"),
        ({"temperature": float("nan")}, "a temperature is above 0, not nan"),
        ({"thresholds": dict.fromkeys(LABELS, 0.5) | {"rain": 1.5}}, "from 0 to 1, not rain 1.5"),
        ({"thresholds": dict.fromkeys(LABELS, 0.5) | {"haze": float("nan")}}, "from 0 to 1, not haze nan"),
    ],
    ids=[
        "backbone",
        "hub",
        "option",
        "no name",
        "thresholds",
        "view",
        "labels",
        "frozen",
        "undefined",
        "unreachable",
        "no threshold",
    ],
)
def test_a_wrong_description_is_refused(tiny, change, message):
    tensors, metadata = contents(tiny)
    metadata["classifier"] = json.dumps({**json.loads(metadata["classifier"]), **change})
    path = rewritten(tiny, tensors, metadata)
    for look in (load_classifier,) if "architecture" in change else (load_classifier, classifier_sha256):
        with pytest.raises(ClassifierWeightsError, match=message):
            look(path)


def test_a_description_with_a_gap_is_refused(tiny):
    tensors, metadata = contents(tiny)
    description = json.loads(metadata["classifier"])
    del description["temperature"]
    with pytest.raises(ClassifierWeightsError, match="lacks temperature"):
        load_classifier(rewritten(tiny, tensors, {**metadata, "classifier": json.dumps(description)}))


def test_a_description_or_card_that_nests_deeper_than_python_follows_is_refused(tiny):
    deep = "[" * 100_000 + "]" * 100_000
    tiny.with_suffix(".json").write_text(deep)
    with pytest.raises(ClassifierWeightsError, match="is not a classifier's card"):
        classifier_sha256(tiny)
    tiny.with_suffix(".json").unlink()
    tensors, metadata = contents(tiny)
    with pytest.raises(ClassifierWeightsError, match="no readable description"):
        load_classifier(rewritten(tiny, tensors, metadata | {"classifier": deep}))


@pytest.mark.parametrize("metadata", [{}, {"format": "something-else"}, {"format": "dfpir-classifier-1"}])
def test_weights_of_something_else_are_refused(tmp_path, metadata):
    path = rewritten(tmp_path / "other.safetensors", {"weight": torch.zeros(2)}, metadata or None)
    with pytest.raises(ClassifierWeightsError, match=r"other\.safetensors"):
        load_classifier(path)


def test_a_damaged_file_is_refused(tiny):
    tiny.write_bytes(tiny.read_bytes()[:200])
    for look in (load_classifier, classifier_sha256):
        with pytest.raises(ClassifierWeightsError, match="not a readable"):
            look(tiny)


def test_a_card_of_another_file_is_refused(tiny):
    card = write_card(tiny, quality={"accuracy": 0.1})
    described = json.loads(card.read_text())
    assert described["sha256"] == load_classifier(tiny).sha256
    assert described["size_bytes"] == tiny.stat().st_size
    assert described["quality"] == {"accuracy": 0.1}
    assert described["sha256"] == classifier_sha256(tiny)
    card.write_text(json.dumps({**described, "sha256": "0" * 64}))
    for look in (load_classifier, classifier_sha256):
        with pytest.raises(ClassifierWeightsError, match="but its card"):
            look(tiny)
    card.write_text("{}")
    with pytest.raises(ClassifierWeightsError, match="not a classifier's card"):
        load_classifier(tiny)


def test_the_default_architecture_takes_its_views():
    network = DegradationNetwork(Architecture(), crop_px=96).eval()
    with torch.inference_mode():
        assert network(torch.rand(1, 4, 3, 96, 96), torch.rand(1, 3, 96, 96)).shape == (1, len(LABELS))


def test_the_power_spectrum_is_flat_for_noise_and_falls_along_a_blur():
    noise = torch.from_numpy(np.random.default_rng(0).normal(128, 10, (64, 96, 96)).astype(np.float32))
    blurred = torch.stack([noise.roll(shift, dims=2) for shift in range(9)]).mean(dim=0)  # along the rows
    spectrum = PowerSpectrum(96)

    def log_power(images):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            power = spectrum(images[None, :, None].expand(1, 64, 3, 96, 96))
        assert power.shape == (1, 2, 96, 49)
        assert power.dtype == torch.float32
        return power[0, 0] - spectrum.fall

    assert log_power(noise)[5:40].mean().item() == pytest.approx(np.log(100), abs=0.05)
    horizontal, vertical = log_power(blurred)[44:53, 30:45], log_power(blurred)[70:90, :4]
    assert vertical.mean().item() == pytest.approx(np.log(100), abs=0.5)
    assert vertical.mean() - horizontal.mean() > 2


# The shipped weights


def test_the_shipped_file_is_small_and_described():
    card = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert SHIPPED.stat().st_size < 6e6
    assert card["sha256"] == file_sha256(SHIPPED)
    assert card["size_bytes"] == SHIPPED.stat().st_size
    assert card["licence"]
    assert load_classifier("degradation-small").name == "degradation-small"
    assert load_weights(SHIPPED).network.small_output is not None


@pytest.mark.parametrize("label", [label for label in LABELS if label is not Degradation.OTHER])
def test_shipped_weights_recognise_the_labelled_set(label):
    folder = TEST_DATA / "labelled" / label
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]
    predictions = load_classifier("degradation-small").predict(images)
    right = [p.label == label and p.confident for p in predictions]
    assert np.mean(right) >= 0.85


# The form for predictions


def with_random_statistics(path):
    """The tiny network, its batch norms as after a training."""
    network = load_weights(path).network
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.uniform_(0.5, 1.5)
    return network


def test_folded_batch_norms_change_nothing_but_rounding(tiny):
    network = with_random_statistics(tiny)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    form = inference_form(network, torch.float32)
    norms = [name for name, module in form.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms == ["spectrum_backbone.0"]  # no convolution comes before it
    crops, thumbnails = torch.rand(2, 3, 3, 32, 32) * 255, torch.rand(2, 3, 32, 32) * 255
    with torch.inference_mode():
        assert torch.allclose(form(crops, thumbnails), network(crops, thumbnails), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_bfloat16_moves_probabilities_little():
    pixels = np.asarray(Image.fromarray(data.astronaut()).resize((256, 256)))
    noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 25, pixels.shape), 0, 255).astype(np.uint8)
    exact, rounded = (load_classifier("degradation-small", dtype=d) for d in (torch.float32, torch.bfloat16))
    views = [exact.take_views(image) for image in (pixels, noisy)]
    for expected, found in zip(exact.probabilities(views), rounded.probabilities(views), strict=True):
        assert max(abs(expected[label] - found[label]) for label in LABELS) <= 0.05
    assert rounded.network.crop_backbone.conv1[0].weight.dtype == torch.bfloat16
    assert rounded.network.head[-1].weight.dtype == torch.float32


def test_a_device_for_which_there_is_no_code_is_refused(tiny):
    with pytest.raises(ValueError, match="device must be cpu or cuda, not mps"):
        load_classifier(tiny, device="mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["degradation-small", "clip:none.pt"])
def test_a_gpu_that_is_not_there_is_told_with_advice(name):
    with pytest.raises(ValueError, match="no CUDA device here; use device='cpu'"):
        load_classifier(name, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_what_a_cpu_says_and_of_many_what_it_says_of_one(tmp_path):
    here = load_classifier(write_tiny_classifier(tmp_path / "tiny.safetensors"))
    views = [here.take_views(image) for image in random_images() * 12]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there = load_classifier(tmp_path / "tiny.safetensors", device="cuda")
    found = there.probabilities(views)
    for probabilities, expected in zip(found, here.probabilities(views), strict=True):
        assert probabilities == pytest.approx(expected, abs=1e-3)
    assert [there.probabilities([each])[0] for each in views] == found


def test_a_picture_no_larger_than_a_crop_is_seen_once_and_judged_as_by_equal_crops():
    classifier = load_classifier("degradation-small")
    rng = np.random.default_rng(0)
    small, large = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (48, 200))
    views = [classifier.take_views(image) for image in (small, large, small)]
    assert [len(each.crops) for each in views] == [1, 4, 1]
    found = classifier.probabilities(views)
    repeated = [replace(each, crops=np.repeat(each.crops, 4 // len(each.crops), axis=0)) for each in views]
    for probabilities, expected in zip(found, classifier.probabilities(repeated), strict=True):
        assert probabilities == pytest.approx(expected, abs=1e-5)
    assert [classifier.probabilities([each])[0] for each in views] == found


def test_a_network_that_mixes_images_is_asked_about_one_at_a_time(tiny):
    weights = load_weights(tiny)
    forward = weights.network.forward
    weights.network.forward = lambda crops, thumbnails, small: forward(crops, thumbnails, small) + thumbnails.mean()
    views = [TimmClassifier(load_weights(tiny)).take_views(image) for image in random_images()]
    with pytest.warns(UserWarning, match="one by one"):
        classifier = TimmClassifier(weights)
    with pytest.warns(UserWarning, match="one by one"):  # those of a single crop are asked about apart
        found = classifier.probabilities(views)
    assert found == [classifier.probabilities([each])[0] for each in views]
