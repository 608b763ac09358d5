"""From a training of a classifier to calibrated weights with their card."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classifier.calibration import fit_temperature, fit_thresholds, measured_quality, prior_weights, probabilities
from classifier.labels import Degradation
from classifier.network import DegradationNetwork
from classifier.view import ViewSettings
from classifier.weights import ClassifierWeights, load_weights, save_classifier, write_card
from jobs.classifier_samples import SHARES, Samples, Synthesis, as_batch
from jobs.errors import UsageError
from jobs.training_config import ClassifierTraining, as_plain
from jobs.training_state import config_digest, require_target


@dataclass(frozen=True)
class Trained:
    """The averaged network of a training, on the CPU, what it is calibrated on, and what it took."""

    config: ClassifierTraining
    network: DegradationNetwork
    view: ViewSettings
    held_out: Samples
    small: Synthesis
    """Small images of the photographs that were trained on: `DegradationNetwork.small_output` is fitted to them."""
    small_held_out: Synthesis
    photographs: int
    labelled: Mapping[Degradation, int]
    """Images that carried their label, besides the photographs."""
    step: int
    samples: int
    minutes: float


@torch.no_grad()
def all_hidden(network: DegradationNetwork, samples: Samples) -> tuple[Tensor, Tensor]:
    """What the last layer sees of every sample (M x hidden, float32), and the labels, on the CPU."""
    device = next(network.parameters()).device
    network.eval()
    hidden = []
    for start in range(0, len(samples), 32):
        crops, thumbnails, _ = as_batch(samples[start : start + 32])
        hidden.append(network.hidden(crops.to(device), thumbnails.to(device)).cpu())
    network.train()
    return torch.cat(hidden), torch.from_numpy(samples["label"].copy())


@torch.no_grad()
def all_logits(network: DegradationNetwork, samples: Samples) -> tuple[Tensor, Tensor]:
    """Logits (M x labels, float32) of every sample, and the labels, on the CPU."""
    hidden, labels = all_hidden(network, samples)
    return network.output(hidden.to(network.output.weight.device)).cpu(), labels


def prior_shift(temperature: float) -> Tensor:
    """What a weights file's output bias has more than a training's: how often labels are expected in use."""
    return torch.from_numpy(temperature * np.log(prior_weights(SHARES)))


def weights_of(name: str) -> ClassifierWeights:
    """Those of a classifier by its name or file, without `small_output` and what labels are expected in use."""
    found = load_weights(name)
    found.network.small_output = None
    with torch.no_grad():
        found.network.output.bias.sub_(prior_shift(found.temperature))
    return found


SMALL_SAMPLES = 5
"""Small images to fit `small_output` on, for each sample that the other outputs are calibrated on."""

HOLD = 1e-3
"""What it costs `small_output` to leave the weights of the last layer, by the squared distance."""


def fit_small_output(network: DegradationNetwork, samples: Samples, *, temperature: float) -> None:
    """Gives the network, on the CPU, a last layer for small images, at the temperature of the other one.

    All before it stays as it is. Labels count as often as they are expected in use, so that nothing is to be added.

    Args:
        network: its other last layer, expectation included, is where the fit begins.
        samples: of small images, labels as often as in `SHARES`.
        temperature: by which the logits will be divided.
    """
    hidden, labels = all_hidden(network, samples)
    weights = torch.from_numpy(prior_weights(SHARES)).float()[labels]
    first = network.output
    output = copy.deepcopy(first).requires_grad_(True)
    optimiser = torch.optim.LBFGS(output.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        wrong = F.cross_entropy(output(hidden) / temperature, labels, reduction="none")
        cost = (weights * wrong).mean() + HOLD * (output.weight - first.weight).square().sum()
        cost.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return cost

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    network.small_output = output.requires_grad_(False)


def measured_on_small(
    network: DegradationNetwork, samples: Samples, *, temperature: float, thresholds: Mapping[Degradation, float]
) -> dict[str, Any]:
    """`measured_quality` of `small_output` on small images."""
    assert network.small_output is not None
    hidden, labels = all_hidden(network, samples)
    probability = probabilities(network.small_output(hidden).double().numpy(), temperature)
    return measured_quality(probability, labels.numpy(), weights=prior_weights(SHARES), thresholds=thresholds)


def require_exportable(path: Path, licence: str, config: ClassifierTraining) -> None:
    """Raises UsageError, before the training, where `export` could not write its weights and card."""
    if not licence:
        raise UsageError("--export needs --licence, an SPDX identifier; the photographs' licences decide")
    require_target(path, as_plain(config))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"--export: nothing can be written in {path.parent}: {error.strerror}") from error


def export(trained: Trained, path: Path, *, licence: str) -> dict[str, Any]:
    """Writes the calibrated weights and their card; returns the quality measured on held-out samples, as on the card.

    Temperature and thresholds are fitted on the even samples, the quality is that of the odd ones, each label
    counted as often as it is expected in use. That expectation is added to the last layer's bias. `licence` is an SPDX
    identifier; the photographs' licences decide. Small images get a last layer of their own (`fit_small_output`).
    """
    logits, targets = (t.double().numpy() for t in all_logits(trained.network, trained.held_out))
    labels = targets.astype(np.int64)
    temperature = fit_temperature(logits[::2], labels[::2])
    weights, shift = prior_weights(SHARES), prior_shift(temperature)
    probability = probabilities(logits + shift.numpy(), temperature)
    thresholds = fit_thresholds(probability[::2], labels[::2], weights=weights)
    network = copy.deepcopy(trained.network)
    with torch.no_grad():
        network.output.bias.add_(shift)
    quality = measured_quality(probability[1::2], labels[1::2], weights=weights, thresholds=thresholds)
    count = len(labels)
    fit_small_output(network, trained.small[range(1, SMALL_SAMPLES * count + 1)], temperature=temperature)
    on_small = measured_on_small(
        network, trained.small_held_out[range(1, count + 1)], temperature=temperature, thresholds=thresholds
    )
    provenance = {
        "training": "jobs/train_classifier.py",
        "start_from": str(trained.config.start_from or "nothing"),
        "teacher": str(trained.config.teacher or "none"),
        "photographs": trained.photographs,
        "labelled": ", ".join(f"{label} {count}" for label, count in sorted(trained.labelled.items())) or "none",
        "degradations": "synthesised, jobs/classifier_samples.py",
        "minutes": round(trained.minutes, 1),
        "steps": trained.step,
        "samples": trained.samples,
        "config_sha256": config_digest(as_plain(trained.config)),
    }
    save_classifier(
        path,
        network,
        view=trained.view,
        temperature=temperature,
        thresholds=thresholds,
        licence=licence,
        provenance=provenance,
    )
    measured = {"validation": quality, "small": on_small}
    write_card(path, quality=measured)
    return measured
