"""Trains the classifier that ships with the project: `python -m jobs.train_classifier --help`.

One process, without network access. Views of degraded photographs are kept in a pool of which every step renews
a little, because synthesis costs more than a training step. A run stops after `--max-minutes` and goes on from
its last checkpoint when started again; `--export` then calibrates it on held-out photographs and writes the
weights file with its card.
"""

import argparse
import copy
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classifier.calibration import calibration_error, fit_temperature, fit_thresholds, prior_weights, probabilities
from classifier.labels import LABELS
from classifier.network import Architecture, DegradationNetwork
from classifier.view import ViewSettings
from classifier.weights import save_classifier, write_card
from jobs.classifier_samples import SHARES, Samples
from jobs.errors import TrainingError
from jobs.training_data import Photographs
from jobs.training_state import learning_rate, save_atomically

log = logging.getLogger("train_classifier")

LICENCE = "CC-BY-SA-4.0"
"""The strictest of the training photographs' licences is kept for what was learned from them."""

VIEW = ViewSettings()


def flipped(crops: Tensor, thumbnails: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The views mirrored left to right, and the crops top to bottom, each at random for the whole batch."""
    if rng.random() < 0.5:
        crops, thumbnails = crops.flip(-1), thumbnails.flip(-1)
    return (crops.flip(-2), thumbnails) if rng.random() < 0.5 else (crops, thumbnails)


@torch.no_grad()
def all_logits(network: DegradationNetwork, samples: Samples) -> tuple[Tensor, Tensor]:
    """Logits (M x labels, float32) of every sample, and the labels."""
    network.eval()
    logits = [
        network(*samples.batch(np.arange(start, min(start + 32, samples.filled)))[:2])
        for start in range(0, samples.filled, 32)
    ]
    network.train()
    return torch.cat(logits), torch.from_numpy(samples.labels[: samples.filled])


def validate(network: DegradationNetwork, samples: Samples) -> str:
    """Recall by label and cross-entropy on the held-out samples, for the log."""
    logits, labels = all_logits(network, samples)
    right = logits.argmax(dim=1) == labels
    recall = {str(name): round(float(right[labels == i].float().mean()), 3) for i, name in enumerate(LABELS)}
    return f"cross-entropy {float(F.cross_entropy(logits, labels)):.4f}, recall {recall}"


@torch.no_grad()
def follow(average: DegradationNetwork, network: DegradationNetwork, *, decay: float) -> None:
    """Moves the averaged weights, and the statistics of the batch norms, towards the current ones."""
    current = network.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[name], 1 - decay)


@dataclass(frozen=True)
class Trained:
    """The averaged network of a training, what it is calibrated on, and what it took."""

    network: DegradationNetwork
    held_out: Samples
    photographs: int
    step: int
    samples: int
    minutes: float


def train(arguments: argparse.Namespace) -> Trained:
    """Runs or resumes a training, whose state lies in `arguments.out`."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    photographs = Photographs.clean([arguments.data], validation=False)
    held_out = Samples.synthesise(
        Photographs.clean([arguments.data], validation=True),
        np.random.default_rng(7),
        count=arguments.validation_samples,
        view=VIEW,
    )
    network = DegradationNetwork(Architecture(), crop_px=VIEW.crop_px).to(memory_format=torch.channels_last)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.lr, weight_decay=0.02, fused=True)
    step, seconds, synthesised = 0, 0.0, 0
    if arguments.out.exists():
        state = torch.load(arguments.out, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, synthesised = state["step"], state["seconds"], state["samples"]
        log.info("resumed at step %d", step)
    pool = Samples.empty(arguments.pool, VIEW)
    rng, synthesis_rng = (np.random.default_rng([arguments.seed, step, purpose]) for purpose in range(2))
    begun, last_save, losses = time.monotonic() - seconds, time.monotonic(), []

    def save() -> None:
        state = {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        progress = {"step": step, "seconds": seconds, "samples": synthesised + pool.written}
        save_atomically({**state, **progress}, arguments.out)

    def fresh() -> Samples:
        count = max(arguments.fresh, arguments.first_fill - pool.filled)
        return Samples.synthesise(photographs, synthesis_rng, count=count, view=VIEW)

    with ThreadPoolExecutor(1, "synthesis") as ahead:
        coming: Future[Samples] | None = None
        while (progress := max(step / max(arguments.steps, 1), seconds / 60 / arguments.max_minutes)) < 1:
            pool.add((coming or ahead.submit(fresh)).result())
            coming = ahead.submit(fresh)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, peak=arguments.lr)
            crops, thumbnails, labels = pool.batch(rng.integers(pool.filled, size=arguments.batch))
            crops, thumbnails = flipped(crops, thumbnails, rng)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = network(crops, thumbnails)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.02)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            if not torch.isfinite(norm):
                raise TrainingError(f"the gradient is not finite at step {step}; last good checkpoint: {arguments.out}")
            optimizer.step()
            step += 1
            follow(average, network, decay=min(0.995, step / (step + 20)))
            losses.append(float(loss.detach()))
            seconds = time.monotonic() - begun
            if step % arguments.log_every == 0:
                loss_now = np.mean(losses[-arguments.log_every :])
                log.info("step %d, %.1f min, pool of %d, loss %.4f", step, seconds / 60, pool.filled, loss_now)
            if time.monotonic() - last_save > arguments.save_every_s:
                last_save = time.monotonic()
                save()
                log.info("validation: %s", validate(average, held_out))
    if losses:
        save()
    log.info("ended at step %d after %.1f min; validation: %s", step, seconds / 60, validate(average, held_out))
    return Trained(
        network=average,
        held_out=held_out,
        photographs=len(photographs.images),
        step=step,
        samples=synthesised + pool.written,
        minutes=seconds / 60,
    )


def export(trained: Trained, path: Path) -> dict[str, Any]:
    """Writes the calibrated weights and their card; returns the quality measured on the held-out samples.

    Temperature and thresholds are fitted on the even samples, the quality is that of the odd ones, each label
    counted as often as it is expected in use. That expectation is added to the last layer's bias.
    """
    logits, targets = (t.double().numpy() for t in all_logits(trained.network, trained.held_out))
    labels = targets.astype(np.int64)
    temperature = fit_temperature(logits[::2], labels[::2])
    weights = prior_weights(SHARES)
    shift = temperature * np.log(weights)
    probability = probabilities(logits + shift, temperature)
    thresholds = fit_thresholds(probability[::2], labels[::2], weights=weights)
    network = copy.deepcopy(trained.network)
    with torch.no_grad():
        network.output_bias.add_(torch.from_numpy(shift))
    probability, labels = probability[1::2], labels[1::2]
    predicted, top, weight = probability.argmax(axis=1), probability.max(axis=1), weights[labels]
    sure = top >= np.array([thresholds[label] for label in LABELS])[predicted]
    quality = {
        "samples": len(labels),
        "accuracy": round(float(np.average(predicted == labels, weights=weight)), 4),
        "confident": round(float(np.average(sure, weights=weight)), 4),
        "right_if_confident": round(
            float((weight * sure)[predicted == labels].sum() / max((weight * sure).sum(), 1)), 4
        ),
        "calibration_error": round(calibration_error(probability, labels, weights=weight), 4),
        "confident_recall": {
            str(label): round(float((sure & (predicted == i))[labels == i].mean()), 4) for i, label in enumerate(LABELS)
        },
    }
    provenance = {
        "training": "jobs/train_classifier.py, no pre-training, CPU, bfloat16 autocast",
        "photographs": trained.photographs,
        "degradations": "synthesised, jobs/classifier_samples.py",
        "minutes": round(trained.minutes, 1),
        "steps": trained.step,
        "samples": trained.samples,
    }
    save_classifier(
        path,
        network,
        view=VIEW,
        temperature=temperature,
        thresholds=thresholds,
        licence=LICENCE,
        provenance=provenance,
    )
    write_card(path, quality={"validation": quality})
    return quality


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint (.pt) to write and to resume from")
    parser.add_argument("--export", type=Path, help="weights file (.safetensors) to write at the end")
    parser.add_argument("--max-minutes", type=float, default=45.0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="or that many steps, if they end sooner")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--pool", type=int, default=16_000, help="samples kept in memory")
    parser.add_argument("--first-fill", type=int, default=1500, help="samples made before the first step")
    parser.add_argument("--fresh", type=int, default=6, help="samples renewed every step")
    parser.add_argument("--validation-samples", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50, help="steps between two lines of the log")
    parser.add_argument("--save-every-s", type=float, default=240.0)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = parser.parse_args(argv)
    trained = train(arguments)
    if arguments.export is not None:
        log.info("wrote %s; validation: %s", arguments.export, export(trained, arguments.export))


if __name__ == "__main__":
    main()
