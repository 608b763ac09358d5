"""Trains the compact DFPIR that ships with the project: `python -m jobs.train_restorer --help`.

One process, one network, degradations synthesised as it goes. Needs torch, numpy, pillow and safetensors only.
A run stops after `--max-minutes` or `--steps` and goes on from its last checkpoint when started again.
"""

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier.labels import Degradation
from jobs.training_data import CleanPhotographs
from jobs.training_state import learning_rate, save_atomically
from models.dfpir import DFPIR, DFPIRConfig, PerturbationBlock
from models.prompts import orthogonal_bank
from pipeline.prompting import noise_prompt
from pipeline.synthesis import FloatImage, degrade, to_uint8

log = logging.getLogger("train_restorer")

COMPACT = DFPIRConfig(
    dim=24,
    num_blocks=(1, 2, 2, 2),
    num_refinement_blocks=1,
    heads=(1, 2, 4, 8),
    ffn_expansion_factor=2.0,
    unshuffle_factor=2,
)

NOISE_ALONE = {Degradation.NOISE: 1.0}
FINE_DETAIL = {Degradation.NOISE: 0.6, Degradation.RAIN: 0.4}
TASKS: dict[Degradation, float] = {
    Degradation.NOISE: 0.36,
    Degradation.RAIN: 0.22,
    Degradation.HAZE: 0.14,
    Degradation.BLUR: 0.12,
    Degradation.LOWLIGHT: 0.16,
}
MORE_RAIN: dict[Degradation, float] = {
    Degradation.NOISE: 0.2,
    Degradation.RAIN: 0.36,
    Degradation.HAZE: 0.14,
    Degradation.BLUR: 0.1,
    Degradation.LOWLIGHT: 0.2,
}
MORE_BLUR: dict[Degradation, float] = {
    Degradation.NOISE: 0.12,
    Degradation.RAIN: 0.16,
    Degradation.HAZE: 0.08,
    Degradation.BLUR: 0.55,
    Degradation.LOWLIGHT: 0.09,
}
ALL: dict[Degradation, float] = {
    Degradation.NOISE: 0.18,
    Degradation.RAIN: 0.28,
    Degradation.HAZE: 0.12,
    Degradation.BLUR: 0.3,
    Degradation.LOWLIGHT: 0.12,
}
"""Shares of the degradations in the training patches, once all are there; rain and blur take longest to learn.

Noise comes first, alone, then rain: mixed from the start, the easy gains of haze and low light keep a small
network from ever learning fine detail, while they themselves are learnt within minutes whenever they come.
"""

SMALLEST_SCALE: dict[Degradation, float] = {Degradation.HAZE: 0.2, Degradation.LOWLIGHT: 0.2}
"""Haze and low light are judged on more of the scene than a small patch shows."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training from `start`, a share of the whole: shares of the tasks, patch and batch size."""

    start: float
    tasks: dict[Degradation, float]
    patch_px: int
    batch: int


PHASES = (
    Phase(0.0, NOISE_ALONE, 64, 8),
    Phase(0.08, FINE_DETAIL, 64, 8),
    Phase(0.18, TASKS, 64, 8),
    Phase(0.3, MORE_RAIN, 64, 8),
    Phase(0.49, MORE_BLUR, 128, 6),
    Phase(0.75, ALL, 128, 6),
)


@dataclass(frozen=True)
class Sample:
    """One training pair, H x W x 3 float32 in [0, 1], and its prompt."""

    degraded: FloatImage
    clean: FloatImage
    prompt: str


def draw_sample(photographs: CleanPhotographs, rng: np.random.Generator, *, label: Degradation, side_px: int) -> Sample:
    """A degraded patch, rounded to eight bits as a file would hold it, with its clean original.

    Noise gets the prompt for its sigma as an estimator would see it: with a tenth of error.
    """
    clean = photographs.patch(rng, side_px=side_px, smallest_scale=SMALLEST_SCALE.get(label, 0.5))
    degraded, sigma_255 = degrade(clean, label, rng)
    prompt = noise_prompt(sigma_255 * rng.normal(1, 0.1)) if sigma_255 is not None else str(label)
    return Sample(to_uint8(degraded).astype(np.float32) / np.float32(255), clean, prompt)


def to_batch(images: list[FloatImage]) -> Tensor:
    """Stacks H x W x 3 images into B x 3 x H x W, channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def relative_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean over the batch of log(L1 + 0.002): each image weighs by its relative error, as in decibels.

    With plain L1 the large errors of haze and low light drown the gradient of noise, rain and blur.
    """
    return ((restored.float() - clean).abs().mean(dim=(1, 2, 3)) + 2e-3).log().mean()


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


@torch.no_grad()
def validate(network: DFPIR, photographs: CleanPhotographs, *, side_px: int = 192, count: int = 8) -> dict[str, float]:
    """Gain in PSNR (dB) by degradation on fixed patches of the validation photographs."""
    bank = orthogonal_bank()
    gains = {}
    for label in TASKS:
        rng = np.random.default_rng(7)
        gain = []
        for _ in range(count):
            sample = draw_sample(photographs, rng, label=label, side_px=side_px)
            degraded, clean = to_batch([sample.degraded]), to_batch([sample.clean])
            with torch.autocast(degraded.device.type, dtype=torch.bfloat16):
                restored = network(degraded, bank.embeddings[bank.indices([sample.prompt])])
            errors = [(image.float().clamp(0, 1) - clean).square().mean().log10() for image in (degraded, restored)]
            gain.append(float(10 * (errors[0] - errors[1])))
        gains[str(label)] = float(np.mean(gain))
    return gains


def train(arguments: argparse.Namespace) -> None:
    """Runs or resumes a training; the state lies in `arguments.out`."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    photographs = CleanPhotographs.load(arguments.data, validation=False)
    held_out = CleanPhotographs.load(arguments.data, validation=True)
    log.info("%d photographs for training, %d for validation", len(photographs.images), len(held_out.images))
    bank = orthogonal_bank()
    network = DFPIR(COMPACT)
    initialise(network)
    network.to(memory_format=torch.channels_last)
    average = DFPIR(COMPACT).to(memory_format=torch.channels_last).requires_grad_(False)
    average.load_state_dict(network.state_dict())
    trained: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
    by_name = dict(average.named_parameters())
    averaged: list[Tensor] = [by_name[name] for name, p in network.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    step, seconds = 0, 0.0
    if arguments.out.exists():
        state = torch.load(arguments.out, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        log.info("resumed at step %d", step)

    def checkpoint() -> dict[str, Any]:
        states = {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        return states | {"step": step, "seconds": seconds}

    started, last_save, losses = time.monotonic(), time.monotonic(), []
    before = seconds
    while step < arguments.steps:
        seconds = before + time.monotonic() - started
        progress = max(step / arguments.steps, seconds / 60 / arguments.max_minutes)
        if progress >= 1:
            break
        phase = [p for p in PHASES if p.start <= progress][-1]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, peak=arguments.lr)
        rng = np.random.default_rng([arguments.seed, step])
        shares = np.array(list(phase.tasks.values()))
        labels = rng.choice(list(phase.tasks), size=phase.batch, p=shares / shares.sum())
        samples = [draw_sample(photographs, rng, label=Degradation(label), side_px=phase.patch_px) for label in labels]
        degraded, clean = to_batch([s.degraded for s in samples]), to_batch([s.clean for s in samples])
        prompts = bank.embeddings[bank.indices([s.prompt for s in samples])]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            restored = network(degraded, prompts)
        loss = relative_l1(restored, clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trained, 2.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {step}; last good checkpoint: {arguments.out}")
        optimizer.step()
        step += 1
        decay = min(0.999, step / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, trained, 1 - decay)
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            log.info(
                "step %d, %.1f min, %d px, loss %.4f, gradient %.2f",
                step, seconds / 60, phase.patch_px, np.mean(losses[-50:]), float(norm),
            )  # fmt: skip
        if time.monotonic() - last_save > arguments.save_every_s:
            last_save = time.monotonic()
            save_atomically(checkpoint(), arguments.out)
            log.info("validation gain in dB: %s", {k: round(v, 2) for k, v in validate(average, held_out).items()})
    save_atomically(checkpoint(), arguments.out)
    log.info("ended at step %d after %.1f min", step, seconds / 60)
    log.info("validation gain in dB: %s", {k: round(v, 2) for k, v in validate(average, held_out, count=24).items()})


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint (.pt) to write and to resume from")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--max-minutes", type=float, default=100.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every-s", type=float, default=300.0)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
