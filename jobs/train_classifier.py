"""Trains a classifier: `dfpir train classifier CONFIG.toml`, or `python -m jobs.train_classifier --help`.

One process, without network access. Views of degraded photographs are kept in a pool of which every step renews
a little, because synthesis costs more than a training step. A training ends where its configuration says, a call after
`--max-minutes` at the latest, and the same call goes on; `--export` then calibrates it on held-out photographs and
writes the weights file with its card. Where the configuration counts steps, the result does not depend on where it
was cut.
"""

import copy
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classifier.errors import ClassifierWeightsError
from classifier.labels import LABELS
from classifier.network import DegradationNetwork
from classifier.view import ViewSettings
from jobs.classifier_samples import Pool, Samples, Synthesis, as_batch
from jobs.errors import TrainingError, UsageError
from jobs.export_classifier import Trained, all_logits, export, require_exportable, weights_of
from jobs.training_config import ClassifierTraining, ConfigError, read_config
from jobs.training_data import Photographs, inventory, parts, tell_if_changed
from jobs.training_diary import Diary
from jobs.training_group import Group
from jobs.training_loop import (
    TrainingRun,
    mixed_precision,
    prefetch,
    read_arguments,
    require_room,
    run,
    run_as_command,
    usable_device,
)
from jobs.training_state import (
    CHECKPOINT,
    PORTABLE,
    found_state,
    last_good,
    resuming,
    save_atomically,
    start_from,
    to_float16,
)
from pipeline.synthesis import FloatImage, from_uint8

log = logging.getLogger("training")

VIEW = ViewSettings()
HELD_OUT_SEED = 7
"""Held-out samples are the same in every training."""

STEP_KEY = 1
"""Beside seed and step: without it a step would draw from the random numbers of the sample of its number."""

LABELS_SHARE = 0.4
"""Of the loss under a teacher."""

SOFTNESS = 2.0
"""Temperature at which pupil and teacher are compared."""


def flipped(crops: Tensor, thumbnails: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The views mirrored left to right, and the crops top to bottom, each at random for the whole batch."""
    if rng.random() < 0.5:
        crops, thumbnails = crops.flip(-1), thumbnails.flip(-1)
    return (crops.flip(-2), thumbnails) if rng.random() < 0.5 else (crops, thumbnails)


def hardest(logits: Tensor, samples: Samples) -> FloatImage:
    """A sheet in [0, 1]: for each label thumbnail and crops of the sample that is taken least for what it is."""
    labels = torch.from_numpy(samples["label"].copy())
    wrong = F.cross_entropy(logits, labels, reduction="none")
    rows = []
    for index in sorted(set(labels.tolist())):
        worst = samples[int(torch.where(labels == index, wrong, -1).argmax())]
        crops = worst["crops"]
        thumbnail = np.zeros_like(crops[0])
        side = min(crops.shape[1], worst["thumbnail"].shape[0])
        thumbnail[:side, :side] = worst["thumbnail"][:side, :side]
        rows.append(np.concatenate([thumbnail, *crops], axis=1))
    return from_uint8(np.concatenate(rows))


@torch.no_grad()
def follow(average: DegradationNetwork, network: DegradationNetwork, *, decay: float) -> None:
    """Moves the averaged weights, and the statistics of the batch norms, towards the current ones."""
    current = network.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(current[name], 1 - decay)


def blended(crops: Tensor, thumbnails: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The views, the first half of the batch each blended with another sample's, half of these at random dimmed.

    What lies between the samples has no label, but a teacher's opinion of it (Beyer et al., "Knowledge distillation: a
    good teacher is patient and consistent", CVPR 2022).
    """
    half = len(crops) // 2
    others = torch.from_numpy(rng.permutation(len(crops))[:half]).to(crops.device)
    share = rng.uniform(0, 1, half)
    gain = np.where(rng.random(half) < 0.5, 1, np.exp(rng.uniform(np.log(0.4), np.log(1.15), half)))

    def blend(views: Tensor) -> Tensor:
        own, other = (
            torch.from_numpy(gain * part).to(views).view(-1, *[1] * (views.ndim - 1)) for part in (share, 1 - share)
        )
        return torch.cat([(own * views[:half] + other * views[others]).round().clamp(0, 255), views[half:]])

    return blend(crops), blend(thumbnails)


class Training(TrainingRun):
    """A classifier's training."""

    config: ClassifierTraining
    network: DegradationNetwork
    average: DegradationNetwork

    def __init__(self, config: ClassifierTraining, out: Path, device: torch.device) -> None:
        """Takes up the folder's checkpoint, or a portable one, or begins."""
        super().__init__(config, out, device)
        build = partial(DegradationNetwork, config.network, crop_px=VIEW.crop_px)
        try:
            require_room(build, device)
            self.network = build()
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"network.backbone {config.network.backbone} is no ResNet of timm: {error}") from error
        out.mkdir(parents=True, exist_ok=True)
        state = found_state(out, config)
        if state is None and config.start_from is not None:
            start_from(self.network, config.start_from, lambda name: weights_of(name).network.state_dict())
        self.network.to(device).to(memory_format=torch.channels_last)
        self.teacher = self._teacher(config.teacher) if config.teacher is not None else None
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=0.0, weight_decay=config.weight_decay, fused=True
        )
        if state is not None:
            with resuming(out):
                self.take_up(state)
                taught_by = state["teacher"]
            if taught_by != self.taught_by:
                raise UsageError(f"teacher {config.teacher} has other weights than this training began under")
        else:
            (out / "pool").unlink(missing_ok=True)  # another training's
        self.pool = Pool(out / "pool", config.pool, VIEW)

    def _teacher(self, name: Path) -> DegradationNetwork:
        try:
            teacher = weights_of(str(name))
        except ClassifierWeightsError as error:
            raise UsageError(f"teacher: {error}") from error
        if teacher.view != VIEW:
            raise UsageError(f"teacher {name} sees {teacher.view}, this training {VIEW}")
        return teacher.network.to(self.device).to(memory_format=torch.channels_last)

    @property
    def newest(self) -> int:
        """Number of the newest sample that the next step may draw."""
        return min(self.config.first_fill, self.config.pool) + self.config.fresh * self.step

    def numbers(self) -> tuple[list[Sequence[int]], Iterator[Sequence[int]]]:
        """Samples to be made: portions of what the pool lacks, and what each step renews from now on."""
        lacking, portion, fresh = self.pool.missing(self.newest), max(self.config.fresh, 1), self.config.fresh
        first = self.newest + 1
        portions: list[Sequence[int]] = [lacking[start : start + portion] for start in range(0, len(lacking), portion)]
        return portions, (range(first + fresh * i, first + fresh * (i + 1)) for i in itertools.count())

    @property
    def taught_by(self) -> str | None:
        """Digest of the teacher's weights."""
        if self.teacher is None:
            return None
        digest = hashlib.sha256()
        for tensor in self.teacher.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self) -> None:
        """See `TrainingRun.save`."""
        network, average = self.network.state_dict(), self.average.state_dict()
        whole = {"network": network, "average": average, "optimiser": self.optimiser.state_dict()}
        place = self.place() | {"teacher": self.taught_by}
        save_atomically(place | whole, self.out / CHECKPOINT)
        save_atomically(place | {"network": to_float16(network), "average": to_float16(average)}, self.out / PORTABLE)

    def loss(self, crops: Tensor, thumbnails: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
        """Cross-entropy with the labels; under a teacher the divergence from its predictions has the larger part.

        Where the teacher takes a sample for something else, the label alone counts. Half of a taught batch is `blended`
        and has that divergence alone, at `SOFTNESS` (Hinton et al., "Distilling the knowledge in a neural network",
        2015).
        """
        with mixed_precision(self.device):
            if self.teacher is None:
                return F.cross_entropy(self.network(crops, thumbnails).float(), labels, label_smoothing=0.02)
            crops, thumbnails = blended(crops, thumbnails, rng)
            with torch.no_grad():
                taught = (self.teacher(crops, thumbnails).float() / SOFTNESS).log_softmax(dim=1)
            logits = self.network(crops, thumbnails).float()
        said = (logits / SOFTNESS).log_softmax(dim=1)
        divergence = SOFTNESS**2 * F.kl_div(said, taught, log_target=True, reduction="none").sum(dim=1)
        wrong = F.cross_entropy(logits, labels, label_smoothing=0.02, reduction="none")
        share = torch.where(taught.argmax(dim=1) == labels, LABELS_SHARE, 1.0)
        share[: len(share) // 2] = 0
        return (share * wrong + (1 - share) * divergence).mean()

    def learn(self) -> float:
        """One step on samples of the pool; returns the loss.

        Raises:
            TrainingError: the gradient is not finite; parameters and checkpoint are as they were.
        """
        rate = self.config.learning_rate_at(self.progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng([self.config.seed, self.step, STEP_KEY])
        torch.manual_seed(int(rng.integers(2**62)))  # of the dropout
        samples = self.pool.draw(rng, newest=self.newest, count=self.config.batch)
        crops, thumbnails, labels = (each.to(self.device) for each in as_batch(samples))
        crops, thumbnails = flipped(crops, thumbnails, rng)
        loss = self.loss(crops, thumbnails, labels, rng)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        if not torch.isfinite(norm):
            numbers = ", ".join(str(number) for number in samples["number"])
            raise TrainingError(
                f"loss {float(loss.detach()):.4g} or its gradient is not finite at step {self.step}, "
                f"samples {numbers}; {last_good(self.out)}"
            )
        self.optimiser.step()
        self.step += 1
        follow(self.average, self.network, decay=self.config.average_decay_at(self.step))
        return float(loss.detach())


def _as_bytes(samples: Any) -> Tensor:
    """Records as a tensor, which loader processes hand over in shared memory instead of a pipe."""
    return torch.from_numpy(samples.view(np.uint8))


def _run(
    training: Training,
    synthesis: Synthesis,
    held_out: Samples,
    diary: Diary,
    loaders: int,
    deadline: float,
) -> None:
    """Fills the pool, then learns."""
    if training.step:
        log.info("resumed at step %d", training.step)
    lacking, renewed = training.numbers()
    numbers = itertools.chain(lacking, renewed)
    coming = iter(prefetch(synthesis, numbers, loaders=loaders, collate_fn=_as_bytes))

    def renew() -> None:
        training.pool.add(next(coming).numpy().view(training.pool.samples.dtype))

    def learn() -> float:
        loss = training.learn()
        renew()
        return loss

    def validate() -> None:
        logits, labels = all_logits(training.average, held_out)
        right, loss = logits.argmax(dim=1) == labels, float(F.cross_entropy(logits, labels))
        recall = {str(name): float(right[labels == i].float().mean()) for i, name in enumerate(LABELS)}
        line = f"cross-entropy {loss:.4f}, recall {', '.join(f'{name} {r:.1%}' for name, r in recall.items())}"
        values = {"cross-entropy": loss} | {f"recall/{name}": r for name, r in recall.items()}
        diary.validation(training.step, line, values, hardest(logits, held_out))

    run(
        training,
        learn,
        validate,
        diary=diary,
        group=Group(training.device),
        deadline=deadline,
        preparations=[renew] * len(lacking),
    )


def train(
    config: ClassifierTraining,
    out: Path,
    *,
    device: str = "cpu",
    threads: int = 0,
    loaders: int = 0,
    max_minutes: float = math.inf,
) -> Trained:
    """Begins a training or goes on with it, until its end or for `max_minutes`.

    Args:
        config: what is trained.
        out: the training's folder; the pool of samples needs some 140 kB there for each.
        device: `cpu` or a CUDA device.
        threads: of torch; 0 leaves its choice.
        loaders: processes that make samples ahead; 0: none, samples are made between steps.
        max_minutes: of this call.

    Raises:
        ConfigError: the folder has a checkpoint of another configuration or network.
        UsageError: too few photographs can be read, there are no weights to start from, no such device, or too little
            memory for the network.
        TrainingError: the gradient is not finite (the message names step, samples and last good checkpoint), memory is
            full, or the disk has no room for pool or checkpoint.
    """
    deadline = time.monotonic() + 60 * max_minutes
    if threads:
        torch.set_num_threads(threads)
    used = usable_device(device)
    out.mkdir(parents=True, exist_ok=True)
    with closing(Diary(out)) as diary:

        def read(folders: Sequence[Path]) -> Photographs:
            return Photographs.clean(folders, least_readable=config.data.least_readable)

        everything = read(config.data.clean)
        labelled = {label: read(folders) for label, folders in config.data.labelled.items()}
        photographs, others = (everything.part(validation=validation) for validation in (False, True))
        known, other_known = (parts(labelled, validation=validation) for validation in (False, True))
        training = Training(config, out, used)
        validation_set = Synthesis(others, other_known, seed=HELD_OUT_SEED, view=VIEW, training=False)
        small = Synthesis(photographs, seed=config.seed, view=VIEW, training=True, small=True)
        small_held_out = Synthesis(others, seed=HELD_OUT_SEED, view=VIEW, training=False, small=True)
        held_out = validation_set[range(1, config.validation_samples + 1)]
        if training.progress < 1:
            log.info("training: %d photographs, validation: %d", len(photographs.names), len(others.names))
            now = inventory([photographs, *known.values()])
            tell_if_changed(training.inventory, now)
            training.inventory = now
            synthesis = Synthesis(photographs, known, seed=config.seed, view=VIEW, training=True)
            _run(training, synthesis, held_out, diary, loaders, deadline)
        else:
            log.info("the training is over, at step %d", training.step)
    return Trained(
        config=config,
        network=copy.deepcopy(training.average).cpu(),
        view=VIEW,
        held_out=held_out,
        small=small,
        small_held_out=small_held_out,
        photographs=len(photographs.names),
        labelled={label: len(images.names) for label, images in known.items()},
        step=training.step,
        samples=training.newest,
        minutes=training.seconds / 60,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of a host that has none of the other commands' libraries."""
    more: dict[str, Any] = {
        "export": {"type": Path, "help": "weights file (.safetensors) to write at the end"},
        "licence": {"default": "", "help": "SPDX identifier of the exported weights' licence"},
    }
    options = read_arguments(str(__doc__), argv, **more)
    config, out, target, licence = (options.pop(name) for name in ("config", "out", "export", "licence"))

    def work() -> None:
        training = read_config(ClassifierTraining, config)
        if target is not None:
            require_exportable(target, licence, training)
        trained = train(training, out, **options)
        if target is not None:
            log.info("wrote %s; validation: %s", target, export(trained, target, licence=licence))

    run_as_command(work)


if __name__ == "__main__":
    main()
