"""Trains a DFPIR restorer: `dfpir train restorer CONFIG.toml`, or `python -m jobs.train_restorer --help`.

One process, one network, degradations synthesised as it goes. Needs torch, numpy, pillow and safetensors only, so
that it runs on a bare GPU host; logs for TensorBoard are written where that is installed. A training ends where its
configuration says, a call after `--max-minutes` at the latest; the same call goes on from the last checkpoint. Where
the configuration counts steps, the result does not depend on where it was cut.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from jobs.errors import TrainingError, UsageError
from jobs.restorer_samples import Sample, Sources, to_batch
from jobs.training_config import RestorerTraining, as_plain, read_config
from jobs.training_state import CHECKPOINT, averaged_weights, halved, load_state, save_atomically
from models.dfpir import DFPIR, PerturbationBlock
from models.prompts import PromptBank, clip_bank, orthogonal_bank
from models.registry import resolve
from models.weights import load_checkpoint
from pipeline.synthesis import FloatImage, to_uint8

log = logging.getLogger("train_restorer")

VALIDATION_PX = 192
PORTABLE = "portable.pt"


def relative_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean over the batch of log(L1 + 0.002): each image weighs by its relative error, as in decibels.

    With plain L1 the large errors of haze and low light drown the gradient of noise, rain and blur.
    """
    return ((restored.float() - clean).abs().mean(dim=(1, 2, 3)) + 2e-3).log().mean()


def plain_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """The published loss."""
    return F.l1_loss(restored.float(), clean)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": plain_l1, "relative": relative_l1}


def prompt_bank(name: str) -> PromptBank:
    """The bank that a configuration names: `orthogonal`, a model's by name or file, or CLIP's (`clip:PATH`)."""
    if name == "orthogonal":
        return orthogonal_bank()
    if name.startswith("clip:"):
        return clip_bank(Path(name.removeprefix("clip:")))
    return load_checkpoint(resolve(name).path).prompts


@torch.no_grad()
def initialise(network: DFPIR) -> None:
    """Starts the network as the identity, with perturbation blocks that let their input through.

    A perturbation block has no residual: at the usual random start its attention averages all channels, the skip
    connections carry next to nothing, and a short training hardly recovers. Here half of the shuffled channels
    keep their place under every prompt (the guidance biases, which no gradient ever changes, order them first),
    and query, key and value start alike, so that the attention starts near the unit matrix.
    """
    torch.nn.init.zeros_(network.output.weight)
    for block in network.modules():
        if not isinstance(block, PerturbationBlock):
            continue
        channels = block.conv_out.out_channels
        unit = torch.eye(channels)[:, :, None, None]
        block.linear_layer3.bias[:channels] = torch.arange(channels, 0, -1) * 1000.0
        block.conv1x1.weight[:channels] = unit
        block.conv_out.weight[:, :channels] = unit
        block.conv_out.weight[:, channels:] *= 0.5
        attention = block.select_attn
        attention.temperature.fill_(8.0)
        attention.attn4.fill_(1.0)
        mixing = torch.linalg.qr(torch.randn(channels, channels)).Q[:, :, None, None]
        attention.q.weight.copy_(mixing)
        attention.kv.weight.copy_(torch.cat([mixing, unit]))
        attention.project_out.weight.copy_(unit)
        for depthwise in (attention.q_dwconv, attention.kv_dwconv):
            depthwise.weight *= 0.1
            depthwise.weight[:, :, 1, 1] += 1.0


class Group:
    """The processes that train together, each on its part of every batch: this one alone unless torch has others."""

    def __init__(self, device: torch.device) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.device = device

    @property
    def part(self) -> slice:
        """Of each batch."""
        return slice(self.rank, None, self.size)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Leaves every process with the mean of all gradients."""
        if self.size > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, mean in zip(gradients, torch.split(flat / self.size, sizes), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def first_says(self, value: float) -> float:
        """The value that the first process has: clocks differ."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return float(told)


class Training:
    """A network in training with its moving average and optimiser, in a folder."""

    def __init__(self, config: RestorerTraining, out: Path, device: torch.device) -> None:
        """Takes up the folder's checkpoint, or a portable one, or begins."""
        self.config, self.out, self.device, self.group = config, out, device, Group(device)
        for phase in config.phases:
            if phase.batch % self.group.size:
                raise UsageError(f"a batch of {phase.batch} cannot be shared among {self.group.size} workers equally")
        torch.manual_seed(config.seed)
        self.bank = prompt_bank(config.prompts)
        self.embeddings = self.bank.embeddings.to(device)
        self.network = DFPIR(config.model)
        if config.initialisation == "identity":
            initialise(self.network)
        if config.start_from is not None:
            self.network.load_state_dict(averaged_weights(config.start_from))
        self.network.to(device).to(memory_format=torch.channels_last)
        self.average = DFPIR(config.model).to(device).to(memory_format=torch.channels_last).requires_grad_(False)
        self.average.load_state_dict(self.network.state_dict())
        self.trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        averaged = dict(self.average.named_parameters())
        self.averaged = {name: averaged[name] for name in self.trained}
        self.optimiser = torch.optim.AdamW(
            self.trained.values(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.step, self.seconds = 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    @property
    def progress(self) -> float:
        """How much of the training is over, 0..1."""
        return self.config.progress(self.step, self.seconds)

    def _resume(self) -> None:
        if (path := self.out / CHECKPOINT).exists():
            state = load_state(path, as_plain(self.config))
            self.network.load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            torch.set_rng_state(state["rng"])
        elif (path := self.out / PORTABLE).exists():
            state = load_state(path, as_plain(self.config))
            with torch.no_grad():
                for mine, stored in ((self.trained, state["network"]), (self.averaged, state["average"])):
                    for name, parameter in mine.items():
                        parameter.copy_(stored[name])
        else:
            return
        self.step, self.seconds = state["step"], state["seconds"]
        log.info("resumed at step %d from %s", self.step, path)

    def save(self) -> None:
        """Writes the checkpoint, and a portable one for other machines: weights and their average in float16."""
        common = {"config": as_plain(self.config), "step": self.step, "seconds": self.seconds}
        whole = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "rng": torch.get_rng_state(),
        }
        save_atomically(common | whole, self.out / CHECKPOINT)
        light = {"network": halved(dict(self.trained)), "average": halved(dict(self.averaged))}
        save_atomically(common | light, self.out / PORTABLE)

    def learn(self, samples: Sequence[Sample]) -> float:
        """One step; returns the loss.

        Raises:
            TrainingError: loss or gradient is not finite; weights and checkpoint are as they were.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate_at(self.progress)
        clean = to_batch([sample.clean for sample in samples], self.device)
        self.optimiser.zero_grad(set_to_none=True)
        loss = LOSSES[self.config.loss](self._restored(self.network, samples), clean)
        loss.backward()  # type: ignore[no-untyped-call]
        self.group.average_gradients(self.trained.values())
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip_norm or math.inf)
        if not torch.isfinite(norm):
            batch = ", ".join(f"{sample.name} ({sample.prompt})" for sample in samples)
            raise TrainingError(
                f"loss {float(loss.detach()):.4g} or its gradient is not finite at step {self.step}, batch {batch}; "
                f"last good checkpoint: {self.out / CHECKPOINT}"
            )
        self.optimiser.step()
        self.step += 1
        decay = min(self.config.average_decay, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.values()), list(self.trained.values()), 1 - decay)
        return float(loss.detach())

    def _restored(self, network: DFPIR, samples: Sequence[Sample]) -> Tensor:
        degraded = to_batch([sample.degraded for sample in samples], self.device)
        prompts = self.embeddings[self.bank.indices([sample.prompt for sample in samples])]
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            restored: Tensor = network(degraded, prompts)
        return restored

    @torch.no_grad()
    def validate(self, held_out: Sources, *, count: int) -> tuple[dict[str, tuple[float, float]], FloatImage]:
        """Mean PSNR (dB) before and after by label on fixed patches, and a sheet: degraded, restored, clean."""
        labels = dict.fromkeys(label for phase in self.config.phases for label in phase.tasks)
        found, rows = {}, []
        for label in labels:
            rng = np.random.default_rng(7)
            psnr = []
            for number in range(count):
                sample = held_out.draw(rng, label=label, side_px=VALIDATION_PX, jpeg_share=self.config.jpeg_share)
                restored = self._restored(self.average, [sample])[0].float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
                errors = [float(np.square(image - sample.clean).mean()) for image in (sample.degraded, restored)]
                psnr.append([-10 * math.log10(max(error, 1e-10)) for error in errors])
                if number == 0:
                    rows.append(np.concatenate([sample.degraded, restored, sample.clean], axis=1))
            before, after = np.mean(psnr, axis=0)
            found[str(label)] = float(before), float(after)
        return found, np.concatenate(rows)


class Diary:
    """What a training writes for people: the log, TensorBoard's where that is installed, and sheets of samples."""

    def __init__(self, out: Path) -> None:
        self.out, self.losses = out, list[float]()
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("TensorBoard is not installed: its logs are not written")
        else:
            self.board = SummaryWriter(str(out / "tensorboard"))

    def step(self, training: Training, loss: float) -> None:
        """Notes a step, and every fiftieth the mean since the last time."""
        self.losses.append(loss)
        if training.step % 50:
            return
        mean, rate = float(np.mean(self.losses)), training.optimiser.param_groups[0]["lr"]
        log.info(
            "step %d, %.1f min, %.1f %%, loss %.4f", training.step, training.seconds / 60, 100 * training.progress, mean
        )
        self.losses.clear()
        if self.board is not None:
            self.board.add_scalar("loss", mean, training.step)
            self.board.add_scalar("learning rate", rate, training.step)

    def validation(self, training: Training, found: Mapping[str, tuple[float, float]], sheet: FloatImage) -> None:
        """Notes PSNR by label, and writes the sheet."""
        log.info("validation in dB: %s", ", ".join(f"{k} {a:.2f} ({a - b:+.2f})" for k, (b, a) in found.items()))
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(to_uint8(sheet)).save(folder / f"step-{training.step:07d}.png")
        if self.board is not None:
            for label, (_, after) in found.items():
                self.board.add_scalar(f"PSNR/{label}", after, training.step)
            self.board.add_image("samples", sheet, training.step, dataformats="HWC")
            self.board.flush()


def train(
    config: RestorerTraining,
    out: Path,
    *,
    device: str = "cpu",
    threads: int = 0,
    max_minutes: float = math.inf,
    save_every_s: float = 300.0,
) -> Training:
    """Begins a training or goes on with it, until its end or for `max_minutes`.

    Args:
        config: what is trained.
        out: the training's folder.
        device: `cpu` or a CUDA device.
        threads: of torch; 0 leaves its choice.
        max_minutes: of this call.
        save_every_s: seconds between checkpoints, each with a validation.

    Raises:
        ConfigError: the folder has a checkpoint of another configuration.
        UsageError: too few photographs can be read.
        TrainingError: the loss is not finite; the message names step, batch and last good checkpoint.
    """
    if threads:
        torch.set_num_threads(threads)
    training = Training(config, out, torch.device(device))
    group = training.group
    sources, held_out = (Sources.load(config.data, validation=validation) for validation in (False, True))
    diary = Diary(out) if group.rank == 0 else None
    for part, name in ((sources, "training"), (held_out, "validation")):
        count = len(part.clean.names) if part.clean is not None else 0
        log.info("%s: %d photographs, %d pairs", name, count, sum(len(pairs.names) for pairs in part.pairs.values()))
    begun, before, last_save = time.monotonic(), training.seconds, time.monotonic()

    def coming(step: int) -> Future[list[Sample]]:
        phase = config.phase_at(config.progress(step, training.seconds))
        return ahead.submit(sources.batch, config, phase, step, part=group.part)

    def keep(*, validation_count: int) -> None:
        if diary is not None:
            training.save()
            diary.validation(training, *training.validate(held_out, count=validation_count))

    with ThreadPoolExecutor(1, "synthesis") as ahead:
        samples = coming(training.step)
        while training.progress < 1 and group.first_says(time.monotonic() - begun) < 60 * max_minutes:
            batch, samples = samples.result(), coming(training.step + 1)
            loss = training.learn(batch)
            training.seconds = before + group.first_says(time.monotonic() - begun)
            if diary is not None:
                diary.step(training, loss)
            if time.monotonic() - last_save > save_every_s:
                keep(validation_count=8)
                last_save = time.monotonic()
    keep(validation_count=24)
    how = "over" if training.progress >= 1 else "stopped"
    log.info("%s at step %d, %.1f min", how, training.step, training.seconds / 60)
    return training


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of a host that has none of the other commands' libraries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="configuration (.toml)")
    parser.add_argument("out", type=Path, help="folder of the training: checkpoints, logs, samples")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="of this call")
    parser.add_argument("--save-every-s", type=float, default=300.0)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = {k: v for k, v in vars(arguments).items() if k not in ("config", "out")}
    train(read_config(RestorerTraining, arguments.config), arguments.out, **options)


if __name__ == "__main__":
    main()
