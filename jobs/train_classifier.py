"""Trains a classifier: `dfpir train classifier CONFIG.toml`, or `python -m jobs.train_classifier --help`.

One process, without network access. Views of degraded photographs are kept in a pool of which every step renews
a little, because synthesis costs more than a training step. A training ends where its configuration says, a call after
`--max-minutes` at the latest, and the same call goes on; `--export` then calibrates it on held-out photographs and
writes the weights file with its card.
"""

import argparse
import copy
import logging
import math
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
from jobs.training_config import ClassifierTraining, as_plain, read_config
from jobs.training_data import Photographs
from jobs.training_state import CHECKPOINT, averaged_weights, load_state, save_atomically

log = logging.getLogger("train_classifier")

VIEW = ViewSettings()
LOG_EVERY = 50
"""Steps between two lines of the log."""


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

    config: ClassifierTraining
    network: DegradationNetwork
    held_out: Samples
    photographs: int
    step: int
    samples: int
    minutes: float


def train(
    config: ClassifierTraining,
    out: Path,
    *,
    threads: int = 0,
    max_minutes: float = math.inf,
    save_every_s: float = 240.0,
) -> Trained:
    """Begins a training or goes on with it, until its end or for `max_minutes`, on the CPU.

    Weights, their average, optimiser and step go on exactly; the pool is filled anew with samples not drawn before.

    Raises:
        ConfigError: the folder has a checkpoint of another configuration.
        UsageError: too few photographs can be read.
        TrainingError: the gradient is not finite; the message names step and last good checkpoint.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / CHECKPOINT
    options: dict[str, Any] = {"least_readable": config.data.least_readable}
    photographs = Photographs.clean(config.data.clean, validation=False, **options)
    held_out = Samples.synthesise(
        Photographs.clean(config.data.clean, validation=True, **options),
        np.random.default_rng(7),
        count=config.validation_samples,
        view=VIEW,
    )
    network = DegradationNetwork(Architecture(), crop_px=VIEW.crop_px)
    if config.start_from is not None and not checkpoint.exists():
        network.load_state_dict(averaged_weights(config.start_from))
    network.to(memory_format=torch.channels_last)
    average = copy.deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=config.weight_decay, fused=True)
    step, seconds, synthesised = 0, 0.0, 0
    if checkpoint.exists():
        state = load_state(checkpoint, config)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds, synthesised = state["step"], state["seconds"], state["samples"]
        log.info("resumed at step %d", step)
    pool = Samples.empty(config.pool, VIEW)
    rng, synthesis_rng = (np.random.default_rng([config.seed, step, purpose]) for purpose in range(2))
    begun, before, last_save, losses = time.monotonic(), seconds, time.monotonic(), []

    def save() -> None:
        state = {"network": network.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
        progress = {"step": step, "seconds": seconds, "samples": synthesised + pool.written}
        save_atomically({"config": as_plain(config), **state, **progress}, checkpoint)

    def fresh() -> Samples:
        count = max(config.fresh, min(config.first_fill, config.pool) - pool.filled)
        return Samples.synthesise(photographs, synthesis_rng, count=count, view=VIEW)

    with ThreadPoolExecutor(1, "synthesis") as ahead:
        coming: Future[Samples] | None = None
        while config.progress(step, seconds) < 1 and time.monotonic() - begun < 60 * max_minutes:
            pool.add((coming or ahead.submit(fresh)).result())
            coming = ahead.submit(fresh)
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate_at(config.progress(step, seconds))
            crops, thumbnails, labels = pool.batch(rng.integers(pool.filled, size=config.batch))
            crops, thumbnails = flipped(crops, thumbnails, rng)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = network(crops, thumbnails)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.02)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            if not torch.isfinite(norm):
                raise TrainingError(f"the gradient is not finite at step {step}; last good checkpoint: {checkpoint}")
            optimiser.step()
            step += 1
            follow(average, network, decay=config.average_decay_at(step))
            losses.append(float(loss.detach()))
            seconds = before + time.monotonic() - begun
            if step % LOG_EVERY == 0:
                loss_now = np.mean(losses[-LOG_EVERY:])
                log.info("step %d, %.1f min, pool of %d, loss %.4f", step, seconds / 60, pool.filled, loss_now)
            if time.monotonic() - last_save > save_every_s:
                last_save = time.monotonic()
                save()
                log.info("validation: %s", validate(average, held_out))
    if losses:
        save()
    log.info("ended at step %d after %.1f min; validation: %s", step, seconds / 60, validate(average, held_out))
    return Trained(
        config=config,
        network=average,
        held_out=held_out,
        photographs=len(photographs.names),
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
        "training": "jobs/train_classifier.py, CPU, bfloat16 autocast",
        "start_from": str(trained.config.start_from or "nothing"),
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
        licence=trained.config.licence,
        provenance=provenance,
    )
    write_card(path, quality={"validation": quality})
    return quality


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of a host that has none of the other commands' libraries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="configuration (.toml)")
    parser.add_argument("out", type=Path, help="folder of the training")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="of this call")
    parser.add_argument("--export", type=Path, help="weights file (.safetensors) to write at the end")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = read_config(ClassifierTraining, arguments.config)
    trained = train(config, arguments.out, threads=arguments.threads, max_minutes=arguments.max_minutes)
    if arguments.export is not None:
        log.info("wrote %s; validation: %s", arguments.export, export(trained, arguments.export))


if __name__ == "__main__":
    main()
