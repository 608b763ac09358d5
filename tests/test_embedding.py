"""The networks within a program that has set torch up for its own: the same results, and nothing of its is changed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from synthetic_classifier import write_tiny_classifier
from synthetic_weights import write_tiny_model

from classifier import load_classifier
from classifier.sigma import estimate_sigma
from models import load_restorer

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 150, 3), dtype=np.uint8)


@pytest.fixture
def weights(tmp_path):
    write_tiny_classifier(tmp_path / "classifier.safetensors")
    return tmp_path / "classifier.safetensors", write_tiny_model(tmp_path / "restorer.safetensors")


def loaded(weights):
    classifier, restorer = weights
    return load_classifier(classifier), load_restorer(restorer, tile=64)


def results(classifier, restorer):
    (prediction,) = classifier.predict([IMAGE])
    whole, tiled = restorer.restore([IMAGE[:, :60], IMAGE], ["noise25", "haze"])
    found = [*prediction.probabilities.values(), prediction.noise_sigma_255, *whole.flat, *tiled.flat]
    return np.array(found, float)


@pytest.mark.parametrize("where", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()])
def test_contexts_of_the_program_around_change_nothing(weights, where):
    before = loaded(weights)
    expected = results(*before)
    with where:
        assert np.array_equal(results(*before), expected)
        within = loaded(weights)
        assert np.array_equal(results(*within), expected)
    assert np.array_equal(results(*within), expected)


def test_another_default_dtype_changes_nothing(weights):
    expected = results(*loaded(weights))
    torch.set_default_dtype(torch.float64)
    try:
        assert np.allclose(results(*loaded(weights)), expected, rtol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_noise_is_estimated_whatever_was_set_before_the_import():
    code = """
import numpy as np, torch
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
from classifier.sigma import estimate_sigma
print(estimate_sigma(np.random.default_rng(0).integers(0, 256, (24, 150, 3), dtype=np.uint8)))
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(told) == pytest.approx(estimate_sigma(IMAGE))


def test_random_numbers_of_the_program_around_stay_those_of_its_seed(weights):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    results(*loaded(weights))
    assert torch.rand(1) == expected
