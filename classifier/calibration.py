"""From logits to probabilities that can be believed, and to the thresholds below which the pipeline abstains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from classifier.labels import LABELS, Degradation

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LabelRisk:
    """How sure a label must be: at least `lowest_threshold`, and right in `precision` of the accepted cases."""

    precision: float
    lowest_threshold: float

    @property
    def unfitted_threshold(self) -> float:
        """Where no sample tells how often a label is right: the highest, if it changes a photograph."""
        return HIGHEST_THRESHOLD if self.precision else self.lowest_threshold


LABEL_RISKS: Mapping[Degradation, LabelRisk] = {
    Degradation.NOISE: LabelRisk(precision=0.85, lowest_threshold=0.5),
    Degradation.RAIN: LabelRisk(precision=0.85, lowest_threshold=0.5),
    Degradation.HAZE: LabelRisk(precision=0.85, lowest_threshold=0.5),
    Degradation.BLUR: LabelRisk(precision=0.85, lowest_threshold=0.5),
    Degradation.LOWLIGHT: LabelRisk(precision=0.9, lowest_threshold=0.6),
    Degradation.CLEAN: LabelRisk(precision=0.0, lowest_threshold=0.4),
    Degradation.OTHER: LabelRisk(precision=0.0, lowest_threshold=0.0),
}
"""Brightening a night scene by mistake costs more than smoothing a little grain. A photograph taken for clean is
left alone, just as after an abstention; so is `other`, whatever its probability."""

HIGHEST_THRESHOLD = 0.8
"""No threshold rises above this, even where the precision asked for is never reached."""

EXPECTED_SHARES: Mapping[Degradation, float] = {label: 0.4 if label is Degradation.CLEAN else 0.1 for label in LABELS}
"""How often each label is expected in use: in a folder that nobody has sorted, most often nothing is wrong."""

FEWEST_SAMPLES = 6 * len(LABELS)
"""For a calibration: half of them are fitted, and half measure what came of it."""


def probabilities(logits: FloatArray, temperature: float) -> FloatArray:
    """Softmax of `logits / temperature` over the last axis (Guo et al., "On Calibration", ICML 2017)."""
    scaled = logits / temperature
    exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return cast(FloatArray, exponentials / exponentials.sum(axis=-1, keepdims=True))


def require_usable(temperature: float, thresholds: Mapping[Degradation, float]) -> None:
    """Raises ValueError for a temperature or a threshold under which every image would be abstained, or none."""
    if not 0 < temperature < np.inf:
        raise ValueError(f"a temperature is above 0, not {temperature}")
    if wrong := {label: threshold for label, threshold in thresholds.items() if not 0 <= threshold <= 1}:
        raise ValueError("thresholds are from 0 to 1, not " + ", ".join(f"{key} {at}" for key, at in wrong.items()))


def label_probabilities(logits: FloatArray, temperature: float) -> dict[Degradation, float]:
    """`probabilities` of one image, by label."""
    return dict(zip(LABELS, probabilities(logits, temperature).tolist(), strict=True))


def cross_entropy(logits: FloatArray, labels: NDArray[np.integer], temperature: float) -> float:
    """Mean negative log-likelihood of the labels (M, indices into `LABELS`) under M x labels logits."""
    chosen = probabilities(logits, temperature)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, 1e-12)).mean())


def fit_temperature(logits: FloatArray, labels: NDArray[np.integer]) -> float:
    """The temperature in 0.2..5 that minimises cross-entropy on held-out samples.

    Raises:
        ValueError: there are no samples, or logits and labels differ in number.
    """
    if len(labels) == 0 or len(logits) != len(labels):
        raise ValueError(f"expected one label per row of logits, found {len(labels)} labels, {len(logits)} rows")
    grid = np.exp(np.linspace(np.log(0.2), np.log(5.0), 241))
    return float(grid[np.argmin([cross_entropy(logits, labels, float(t)) for t in grid])])


def prior_weights(trained_shares: Mapping[Degradation, float]) -> FloatArray:
    """How much more often than in training each label is expected in use, in the order of `LABELS`.

    A probability from training times this weight, normalised again, is the probability in use.
    """
    return np.array([EXPECTED_SHARES[label] / trained_shares[label] for label in LABELS])


def fit_thresholds(
    probability: FloatArray,
    labels: NDArray[np.integer],
    *,
    weights: FloatArray,
    risks: Mapping[Degradation, LabelRisk] = LABEL_RISKS,
) -> dict[Degradation, float]:
    """The lowest threshold per label that keeps the precision asked for on held-out samples.

    Where no sample is sure enough and right, a label has its `LabelRisk.unfitted_threshold`.

    Args:
        probability: M x labels, calibrated.
        labels: M, indices into `LABELS`.
        weights: what a sample of each label counts, in the order of `LABELS`; see `prior_weights`.
        risks: what each label asks for.
    """
    predicted, top, weight = probability.argmax(axis=1), probability.max(axis=1), weights[labels]
    thresholds = {}
    for index, label in enumerate(LABELS):
        risk = risks[label]
        threshold = risk.lowest_threshold
        while threshold < HIGHEST_THRESHOLD:
            accepted = (predicted == index) & (top >= threshold)
            if not accepted.any():
                threshold = risk.unfitted_threshold
                break
            right = weight[accepted & (labels == index)].sum()
            if right >= risk.precision * weight[accepted].sum():
                break
            threshold = round(threshold + 0.01, 4)
        thresholds[label] = threshold
    return thresholds


def calibration_error(
    probability: FloatArray, labels: NDArray[np.integer], *, weights: FloatArray, bins: int = 10
) -> float:
    """Expected calibration error: mean distance between confidence and accuracy over equal-width bins.

    `probability` is M x labels, `labels` M indices into `LABELS`, `weights` M: what each sample counts.
    """
    top, right = probability.max(axis=1), probability.argmax(axis=1) == labels
    places = np.minimum((top * bins).astype(int), bins - 1)
    parts = [abs(float((weights * (top - right))[places == place].sum())) for place in np.unique(places)]
    return float(sum(parts) / weights.sum())


def measured_quality(
    probability: FloatArray,
    labels: NDArray[np.integer],
    *,
    weights: FloatArray,
    thresholds: Mapping[Degradation, float],
) -> dict[str, Any]:
    """What a calibration reaches on samples that it was not fitted to, as cards have it.

    `right_if_confident` is None where it is sure of none.

    Args:
        probability: M x labels, calibrated.
        labels: M, indices into `LABELS`.
        weights: what a sample of each label counts, in the order of `LABELS`; see `prior_weights`.
        thresholds: from which each label is sure.
    """
    predicted, weight = probability.argmax(axis=1), weights[labels]
    right = predicted == labels
    sure = probability.max(axis=1) >= np.array([thresholds[label] for label in LABELS])[predicted]
    return {
        "samples": len(labels),
        "accuracy": round(float(np.average(right, weights=weight)), 4),
        "confident": round(float(np.average(sure, weights=weight)), 4),
        "right_if_confident": round(float(np.average(right[sure], weights=weight[sure])), 4) if sure.any() else None,
        "calibration_error": round(calibration_error(probability, labels, weights=weight), 4),
        "confident_recall": {
            str(label): round(float((sure & right)[labels == index].mean()), 4)
            for index, label in enumerate(LABELS)
            if (labels == index).any()
        },
    }
