import numpy as np
import pytest
import torch
from synthetic_classifier import TINY, TINY_VIEW

from classifier.calibration import EXPECTED_SHARES, probabilities
from classifier.labels import LABELS
from classifier.network import DegradationNetwork
from classifier.weights import load_weights
from jobs import export_classifier
from jobs.classifier_samples import SHARES, sample_type
from jobs.export_classifier import SMALL_SAMPLES, Trained, export, prior_shift
from jobs.training_config import ClassifierTraining, Data


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_bias_turns_training_shares_into_expected_ones_at_any_temperature(temperature):
    logits = np.random.default_rng(0).normal(size=(20, len(LABELS)))
    weights = np.array([EXPECTED_SHARES[label] / SHARES[label] for label in LABELS])
    expected = probabilities(logits, temperature) * weights
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities(logits + prior_shift(temperature).numpy(), temperature), expected)


def test_a_card_tells_of_samples_that_nothing_was_fitted_to(tmp_path, monkeypatch):
    """All that are fitted are right and all others wrong, by logits that a training has."""
    labels = torch.arange(140) // 2 % len(LABELS)
    logits = 8 * torch.nn.functional.one_hot((labels + torch.arange(140) % 2) % len(LABELS)).float()
    monkeypatch.setattr(export_classifier, "all_logits", lambda *_: (logits, labels))
    small = np.zeros(SMALL_SAMPLES * len(labels) + 1, sample_type(TINY_VIEW))
    small["label"] = np.arange(len(small)) % len(LABELS)
    network = DegradationNetwork(TINY, crop_px=TINY_VIEW.crop_px)
    trained = Trained(
        config=ClassifierTraining(data=Data(clean=(tmp_path,)), steps=1), network=network, view=TINY_VIEW,
        held_out=np.empty(0), small=small, small_held_out=small,
        photographs=1, labelled={}, step=1, samples=1, minutes=1.0,
    )  # fmt: skip
    quality = export(trained, tmp_path / "own.safetensors", licence="CC0-1.0")["validation"]
    assert quality["accuracy"] == 0
    assert quality["samples"] == 70
    found = load_weights(str(tmp_path / "own.safetensors"))
    moved = found.network.output.bias - network.output.bias
    torch.testing.assert_close(moved.double(), prior_shift(found.temperature), rtol=1e-2, atol=1e-2)
