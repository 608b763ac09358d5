import numpy as np
import pytest

from classifier.calibration import (
    EXPECTED_SHARES,
    HIGHEST_THRESHOLD,
    LABEL_RISKS,
    LabelRisk,
    calibration_error,
    cross_entropy,
    fit_temperature,
    fit_thresholds,
    measured_quality,
    prior_weights,
    probabilities,
)
from classifier.clip_classifier import ClipCalibration
from classifier.labels import LABELS, Degradation

EVEN = np.ones(len(LABELS))


def drawn(temperature, count=4000, seed=0):
    """Logits, and labels drawn from the softmax of logits / temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, len(LABELS)))
    cumulative = probabilities(logits, temperature).cumsum(axis=1)
    return logits, (rng.random((count, 1)) > cumulative).sum(axis=1).clip(max=len(LABELS) - 1)


def test_probabilities_sum_to_one_and_keep_the_order():
    logits = np.random.default_rng(0).normal(0, 50, (20, 7))
    for temperature in (0.5, 1.0, 3.0):
        p = probabilities(logits, temperature)
        np.testing.assert_allclose(p.sum(axis=1), 1)
        np.testing.assert_array_equal(p.argmax(axis=1), logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_the_temperature_that_drew_the_labels_is_found(temperature):
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.1)


def test_the_fitted_temperature_lowers_cross_entropy_and_calibration_error():
    logits, labels = drawn(2.5)
    fitted = fit_temperature(logits, labels)
    assert cross_entropy(logits, labels, fitted) < cross_entropy(logits, labels, 1.0)
    assert calibration_error(probabilities(logits, fitted), labels, weights=np.ones(len(labels))) < 0.03
    assert calibration_error(probabilities(logits, 1.0), labels, weights=np.ones(len(labels))) > 0.1


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="one label per row"):
        fit_temperature(np.zeros((0, 7)), np.zeros(0, int))


def test_thresholds_reach_the_precision_asked_for():
    logits, labels = drawn(2.0, count=20_000)
    p = probabilities(logits, 2.0)
    risks = dict.fromkeys(LABELS, LabelRisk(precision=0.75, lowest_threshold=0.3))
    thresholds = fit_thresholds(p, labels, weights=EVEN, risks=risks)
    for index, label in enumerate(LABELS):
        accepted = (p.argmax(axis=1) == index) & (p.max(axis=1) >= thresholds[label])
        assert thresholds[label] > 0.3
        assert (labels[accepted] == index).mean() >= 0.75


def test_a_dearer_mistake_asks_for_a_higher_threshold():
    logits, labels = drawn(2.0, count=20_000)
    p = probabilities(logits, 2.0)
    cheap = fit_thresholds(p, labels, weights=EVEN, risks=dict.fromkeys(LABELS, LabelRisk(0.7, 0.3)))
    dear = fit_thresholds(p, labels, weights=EVEN, risks=dict.fromkeys(LABELS, LabelRisk(0.8, 0.3)))
    assert all(dear[label] > cheap[label] for label in LABELS)


def test_a_precision_out_of_reach_stops_at_the_highest_threshold():
    p = np.tile([0.99, *[0.01 / 6] * 6], (50, 1))
    thresholds = fit_thresholds(p, np.ones(50, int), weights=EVEN, risks=dict.fromkeys(LABELS, LabelRisk(0.9, 0.5)))
    assert thresholds[Degradation.NOISE] == pytest.approx(HIGHEST_THRESHOLD)


def test_a_label_that_is_never_predicted_keeps_the_threshold_of_no_calibration():
    p = np.tile([0.99, *[0.01 / 6] * 6], (50, 1))
    thresholds = fit_thresholds(p, np.zeros(50, int), weights=EVEN)
    assert thresholds.pop(Degradation.NOISE) == LABEL_RISKS[Degradation.NOISE].lowest_threshold
    changing = {label for label, threshold in thresholds.items() if threshold == HIGHEST_THRESHOLD}
    assert set(thresholds) - changing == {Degradation.CLEAN, Degradation.OTHER}
    assert thresholds == {label: ClipCalibration().thresholds[label] for label in thresholds}


@pytest.mark.parametrize("confidence", [0.4, 0.55])
def test_a_label_that_is_never_right_has_no_lower_threshold_than_one_that_is_never_predicted(confidence):
    """Below the lowest threshold, or always wrong above it: what lies higher up no sample tells."""
    p = np.tile([confidence, *[(1 - confidence) / 6] * 6], (50, 1))
    labels = np.full(50, LABELS.index(Degradation.CLEAN))
    assert fit_thresholds(p, labels, weights=EVEN)[Degradation.NOISE] == HIGHEST_THRESHOLD


def test_calibration_error_is_zero_when_sure_and_right():
    assert calibration_error(np.eye(7)[[0, 3]], np.array([0, 3]), weights=np.ones(2)) == 0
    assert calibration_error(np.eye(7)[[0, 3]], np.array([1, 4]), weights=np.ones(2)) == 1


def test_thresholds_rise_where_mistaken_samples_weigh_more():
    """Noise that is clean in one of ten cases passes for nine parts right, and not once clean counts tenfold."""
    p = np.tile([0.7, *[0.05] * 6], (100, 1))
    labels = np.where(np.arange(100) % 10 == 0, LABELS.index(Degradation.CLEAN), 0)
    risks = dict.fromkeys(LABELS, LabelRisk(0.85, 0.5))
    clean_counts = np.where(np.array(LABELS) == Degradation.CLEAN, 10.0, 1.0)
    assert fit_thresholds(p, labels, weights=EVEN, risks=risks)[Degradation.NOISE] == 0.5
    assert fit_thresholds(p, labels, weights=clean_counts, risks=risks)[Degradation.NOISE] > 0.7


def test_prior_weights_turn_training_shares_into_expected_ones():
    trained = {label: (1 + index) / 28 for index, label in enumerate(LABELS)}
    shares = prior_weights(trained) * np.array(list(trained.values()))
    np.testing.assert_allclose(shares, list(EXPECTED_SHARES.values()))
    assert sum(EXPECTED_SHARES.values()) == pytest.approx(1)


def test_quality_counts_labels_as_often_as_they_are_expected():
    """Of four samples of rain three are right, two of them surely; those of noise are right, one of them surely."""
    p = np.full((6, len(LABELS)), 0.01)
    rain, noise = LABELS.index(Degradation.RAIN), LABELS.index(Degradation.NOISE)
    labels = np.array([rain, rain, rain, rain, noise, noise])
    found = [(rain, 0.9), (rain, 0.9), (rain, 0.5), (noise, 0.9), (noise, 0.5), (noise, 0.9)]
    for row, (predicted, confidence) in enumerate(found):
        p[row, predicted] = confidence
    weights = np.where(np.arange(len(LABELS)) == noise, 4.0, 1.0)
    quality = measured_quality(p, labels, weights=weights, thresholds=dict.fromkeys(LABELS, 0.8))
    error = calibration_error(p, labels, weights=weights[labels])
    assert quality == {
        "samples": 6,
        "accuracy": round(11 / 12, 4),
        "confident": round(7 / 12, 4),
        "right_if_confident": round(6 / 7, 4),
        "calibration_error": round(error, 4),
        "confident_recall": {"noise": 0.5, "rain": 0.5},
    }


def test_light_samples_count_in_full_where_it_is_sure():
    """Of two sure samples of weight 0.25 one is right."""
    p = np.full((3, len(LABELS)), 0.01)
    p[[0, 1, 2], [0, 0, 1]] = [0.9, 0.9, 0.5]
    weights, thresholds = np.full(len(LABELS), 0.25), dict.fromkeys(LABELS, 0.8)
    labels = np.array([0, 1, 1])
    assert measured_quality(p, labels, weights=weights, thresholds=thresholds)["right_if_confident"] == 0.5
    thresholds = dict.fromkeys(LABELS, 0.95)
    assert measured_quality(p, labels, weights=weights, thresholds=thresholds)["right_if_confident"] is None
