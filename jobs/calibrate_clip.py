"""Calibrates CLIP zero-shot on photographs of one's own: `python -m jobs.calibrate_clip --help`.

Clean photographs are degraded as for a training's validation. On every other sample temperature and bias are fitted
to the logits (vector scaling without its gains: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017),
then thresholds; the rest tells what came of it. The result lies beside the weights, where `--classifier clip:WEIGHTS`
finds it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from classifier.calibration import FEWEST_SAMPLES, fit_thresholds, measured_quality, prior_weights, probabilities
from classifier.clip_classifier import ClipCalibration, ClipClassifier
from classifier.clip_weights import require_file
from classifier.errors import ClassifierWeightsError
from classifier.labels import LABELS
from jobs.classifier_samples import as_filed, draw_damaged
from jobs.errors import UsageError
from jobs.places import require_writable
from jobs.training_data import Photographs, photographs_in
from jobs.training_loop import run_as_command, usable_device

FloatArray = NDArray[np.float64]


def fit_scaling(logits: FloatArray, labels: NDArray[np.int64]) -> tuple[float, FloatArray]:
    """Temperature, and a bias for each label, that minimise the cross-entropy of (logits + bias) / temperature."""
    given, targets = torch.from_numpy(logits), torch.from_numpy(labels)
    sharpness = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([sharpness, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        # A little weight decay: without it a label that is always told apart moves off to infinity.
        value = F.cross_entropy(given * sharpness.exp() + bias, targets) + 1e-4 * bias.square().mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    temperature = float((-sharpness).exp().detach())
    return temperature, temperature * bias.detach().numpy()


def calibrate(classifier: ClipClassifier, photographs: Photographs, *, samples: int) -> ClipCalibration:
    """Fits on the even samples and measures on the odd ones, each label counted as often as it is expected in use.

    Raises UsageError if CLIP tells the labels apart no better than one that always says the commonest of them.
    """
    logits = np.empty((samples, len(LABELS)))
    labels = np.arange(samples) // 2 % len(LABELS)
    shown = track(labels, "calibration", console=Console(stderr=True), transient=True)
    for number, label in enumerate(shown):
        rng = np.random.default_rng([0, number])
        image = as_filed(draw_damaged(photographs, LABELS[label], rng), rng)
        logits[number] = classifier.logits(classifier.take_views(image))
    temperature, bias = fit_scaling(logits[::2], labels[::2])
    weights = prior_weights(dict.fromkeys(LABELS, 1 / len(LABELS)))
    bias = bias + temperature * np.log(weights)
    probability = probabilities(logits + bias, temperature)
    thresholds = fit_thresholds(probability[::2], labels[::2], weights=weights)
    quality = measured_quality(probability[1::2], labels[1::2], weights=weights, thresholds=thresholds)
    counts = np.bincount(labels[1::2], weights=weights[labels[1::2]])
    if quality["accuracy"] <= round(float(counts.max() / counts.sum()), 4):
        raise UsageError(
            f"CLIP does not tell the labels apart on these photographs: {quality['accuracy']:.1%} are right, no more "
            f"than if it always said {LABELS[counts.argmax()]} (temperature {temperature:.3g}). Do the weights belong "
            f"to {classifier.calibration.architecture}? Another model is named by --architecture"
        )
    return replace(
        classifier.calibration,
        temperature=temperature,
        bias=dict(zip(LABELS, bias.tolist(), strict=True)),
        thresholds=thresholds,
        quality=quality,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("weights", type=Path, help="CLIP weights that open_clip reads")
    parser.add_argument("photographs", type=Path, nargs="+", help="folders of clean photographs")
    parser.add_argument("--architecture", default=ClipCalibration.architecture, help="open_clip's name of the model")
    parser.add_argument("--samples", type=int, default=2800, help="degraded photographs to calibrate and measure on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    arguments = parser.parse_args(argv)

    def work() -> None:
        if arguments.samples < FEWEST_SAMPLES:
            raise UsageError(f"--samples {arguments.samples}: a calibration needs {FEWEST_SAMPLES} or more")
        uncalibrated = ClipCalibration(architecture=arguments.architecture)
        device = str(usable_device(arguments.device))
        photographs_in(arguments.photographs)  # which are read after the weights: that takes longer
        try:
            require_file(arguments.weights)
            require_writable(ClipCalibration.path(arguments.weights))
            classifier = ClipClassifier(arguments.weights, calibration=uncalibrated, device=device)
            photographs = Photographs.clean(arguments.photographs)
            found = calibrate(classifier, photographs, samples=arguments.samples)
            print(json.dumps(found.quality, indent=2))
            print(f"wrote {found.write(arguments.weights)}")
        except ClassifierWeightsError as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise UsageError(f"{error.filename} cannot be read or written: {error.strerror}") from error

    run_as_command(work)


if __name__ == "__main__":
    main()
