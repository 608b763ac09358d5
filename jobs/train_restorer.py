"""Trains a DFPIR restorer: `dfpir train restorer CONFIG.toml`, or `python -m jobs.train_restorer --help`.

One process, one network, degradations synthesised as it goes. Needs torch, numpy, pillow and safetensors only, so
that it runs on a bare GPU host; logs for TensorBoard are written where that is installed. A training ends where its
configuration says, a call after `--max-minutes` at the latest; the same call goes on from the last checkpoint. Where
the configuration counts steps, the result does not depend on where it was cut.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from jobs.errors import TrainingError, UsageError
from jobs.restorer_samples import Ahead, Batch, Batches, ReadyBatch, Sources
from jobs.training_config import Phase, RestorerTraining, read_config
from jobs.training_data import tell_if_changed
from jobs.training_diary import Diary
from jobs.training_graphs import Gradients, RecordedGradients
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
from jobs.training_prompts import checked_bank, require_prompts, stored_bank, to_store
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
from models.dfpir import DFPIR, DFPIRConfig, PerturbationBlock
from models.memory import on_device
from models.registry import resolve
from pipeline.synthesis import FloatImage

log = logging.getLogger("training")

VALIDATION_PX, VALIDATION_PATCHES = 192, 24
"""Side and number of the patches of each label."""


def relative_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean over the batch of log(L1 + 0.002): each image weighs by its relative error, as in decibels.

    With plain L1 the large errors of haze and low light drown the gradient of noise, rain and blur.
    """
    return ((restored.float() - clean).abs().mean(dim=(1, 2, 3)) + 2e-3).log().mean()


def plain_l1(restored: Tensor, clean: Tensor) -> Tensor:
    """The published loss."""
    return F.l1_loss(restored.float(), clean)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": plain_l1, "relative": relative_l1}


def weights_of(name: str, *, model: DFPIRConfig) -> dict[str, Tensor]:
    """Those of a model by its name or file.

    Raises UsageError if they are of another network than `model`, which the shapes alone need not tell.
    """
    network = resolve(name).load().network
    if network.config != model:
        raise UsageError(f"start_from: {name} is {network.config}, the configuration's model is {model}")
    return network.state_dict()


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
        channels, wide = block.conv1x1.in_channels, block.conv1x1.out_channels
        kept = wide // 2
        unit = torch.eye(channels)[:, :, None, None]
        block.linear_layer3.bias[:kept] = torch.arange(kept, 0, -1) * 1000.0
        block.conv1x1.weight[:kept] = unit[:kept]
        block.conv_out.weight[:, :kept] = unit[:, :kept]
        block.conv_out.weight[:, kept:] *= 0.5
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


class Training(TrainingRun):
    """A restorer's training."""

    config: RestorerTraining
    network: DFPIR

    def __init__(self, config: RestorerTraining, out: Path, device: torch.device, *, compiled: bool = False) -> None:
        """Takes up the folder's checkpoint, or a portable one, or begins; `compiled` makes steps faster."""
        super().__init__(config, out, device)
        require_room(lambda: DFPIR(config.model), device)
        self.group = Group(device)
        out.mkdir(parents=True, exist_ok=True)
        state = found_state(out, config)
        if state is None:
            self.bank = checked_bank(config)
        else:  # whatever the file that it came of holds by now
            with resuming(out):
                self.bank = stored_bank(state)
        self.embeddings = self.bank.embeddings.to(device)
        self.network = DFPIR(config.model)
        if config.initialisation == "identity":
            initialise(self.network)
        if config.start_from is not None and state is None:
            start_from(self.network, config.start_from, partial(weights_of, model=config.model))
            require_prompts(self.bank, config.start_from, config.prompts)
        self.network.to(device).to(memory_format=torch.channels_last)
        self.learner: Callable[..., Any] = torch.compile(self.network, dynamic=False) if compiled else self.network
        self.gradients: Gradients = self._gradients
        self.average = DFPIR(config.model).to(device).to(memory_format=torch.channels_last).requires_grad_(False)
        self.average.load_state_dict(self.network.state_dict())
        self.trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if device.type == "cuda":
            self.gradients = RecordedGradients(self._gradients, list(self.trained.values()))
        averaged = dict(self.average.named_parameters())
        self.averaged = {name: averaged[name] for name in self.trained}
        self.optimiser = torch.optim.AdamW(
            self.trained.values(), lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        if state is not None:
            with resuming(out):
                self.take_up(state)

    def save(self) -> None:
        """See `TrainingRun.save`.

        The guidance layers, which no gradient reaches, are in it as they are: other libraries may draw other ones from
        the same seed, and the channels would have another order.
        """
        whole = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        place = self.place() | to_store(self.bank)
        save_atomically(place | whole, self.out / CHECKPOINT)
        fixed = to_float16({name: tensor for name, tensor in whole["network"].items() if name not in self.trained})
        light = {"network": to_float16(self.trained) | fixed, "average": to_float16(self.averaged) | fixed}
        save_atomically(place | light, self.out / PORTABLE)

    def learn(self, batch: ReadyBatch, meanwhile: Callable[[], None] = lambda: None) -> float:
        """One step; returns the loss. `meanwhile` is called once a GPU has all of the gradient's work before it.

        Raises:
            TrainingError: loss or gradient is not finite, or the network cannot be compiled; parameters and checkpoint
            are as they were.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.learning_rate_at(self.progress)
        try:
            with on_device(self.device):
                loss = self.gradients(batch.degraded, batch.clean, self._embedded(batch.prompts))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise TrainingError(f"the network cannot be compiled here, try without --compile: {error}") from error
        meanwhile()
        self.group.average_gradients(self.trained.values(), samples=len(batch.clean))
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip_norm or math.inf)
        if not torch.isfinite(norm):
            named = ", ".join(f"{name} ({prompt})" for name, prompt in zip(batch.names, batch.prompts, strict=True))
            raise TrainingError(
                f"loss {float(loss):.4g} or its gradient is not finite at step {self.step}{self.group}, "
                f"batch {named}; {last_good(self.out)}"
            )
        self.optimiser.step()
        self.step += 1
        decay = self.config.average_decay_at(self.step)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.values()), list(self.trained.values()), 1 - decay)
        return float(loss)

    def _gradients(self, degraded: Tensor, clean: Tensor, embedded: Tensor) -> Tensor:
        """The loss; every trained parameter has the gradient of this batch alone, in new memory."""
        self.optimiser.zero_grad(set_to_none=True)
        with mixed_precision(self.device):
            restored = self.learner(degraded, embedded)
        loss = LOSSES[self.config.loss](restored, clean)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _embedded(self, prompts: Sequence[str]) -> Tensor:
        return self.embeddings[self.bank.indices(prompts)]

    @torch.no_grad()
    def validate(self, held_out: Sources) -> tuple[dict[str, tuple[float, float]], FloatImage]:
        """Mean PSNR (dB) before and after by label on fixed patches, and a sheet: degraded, restored, clean."""
        labels = dict.fromkeys(label for phase in self.config.phases for label in phase.tasks)
        found, rows = {}, []
        for label in labels:
            rng = np.random.default_rng(7)
            psnr = []
            for number in range(VALIDATION_PATCHES):
                sample = held_out.draw(rng, label=label, side_px=VALIDATION_PX, jpeg_share=self.config.jpeg_share)
                given = Batch.of([sample]).to(self.device)
                with mixed_precision(self.device):
                    restored = self.average(given.degraded, self._embedded(given.prompts)).float().clamp(0, 1)
                errors = [float((image - given.clean).square().mean()) for image in (given.degraded, restored)]
                psnr.append([-10 * math.log10(max(error, 1e-10)) for error in errors])
                if number == 0:
                    row = torch.cat([given.degraded, restored, given.clean], dim=3)[0]
                    rows.append(row.permute(1, 2, 0).cpu().numpy())
            before, after = np.mean(psnr, axis=0)
            found[str(label)] = float(before), float(after)
        return found, np.concatenate(rows)


def batches(
    training: Training, sources: Sources, places: Iterable[tuple[int, Phase]], *, loaders: int
) -> DataLoader[Batch | UsageError]:
    """This process's part of the batch of every step and phase; a GPU gets recipes, and makes the pixels itself."""
    on_gpu = training.device.type == "cuda"
    made = Batches(sources, training.config, training.group.part, as_recipe=on_gpu)
    return prefetch(made, places, loaders=loaders, pin_memory=on_gpu)


def train(
    config: RestorerTraining,
    out: Path,
    *,
    device: str = "cpu",
    threads: int = 0,
    loaders: int = 0,
    compiled: bool = False,
    max_minutes: float = math.inf,
) -> Training:
    """Begins a training or goes on with it, until its end or for `max_minutes`.

    Args:
        config: what is trained.
        out: the training's folder.
        device: `cpu` or a CUDA device.
        threads: of torch; 0 leaves its choice.
        loaders: processes that make samples ahead; 0: none, samples are made between steps.
        compiled: by `torch.compile`, once for each patch size, which takes minutes and a C++ compiler.
        max_minutes: of this call.

    Raises:
        ConfigError: the folder has a checkpoint of another configuration.
        UsageError: too few photographs can be read, there are no weights to start from, no such device, or too little
            memory for the network.
        TrainingError: the loss is not finite (the message names step, batch and last good checkpoint), a photograph
            that is read for every patch cannot be read any more, memory is full, or the disk has no room for a
            checkpoint.
    """
    deadline = time.monotonic() + 60 * max_minutes
    if threads:
        torch.set_num_threads(threads)
    training = Training(config, out, usable_device(device), compiled=compiled)
    if training.progress < 1:
        with closing(Diary(out)) if training.group.rank == 0 else nullcontext() as diary:
            everything = Sources.load(
                config.data, largest_patch_px=max(VALIDATION_PX, *(phase.patch_px for phase in config.phases))
            )
            sources, held_out = (everything.part(validation=validation) for validation in (False, True))
            _run(training, sources, held_out, diary, loaders, deadline)
    elif training.group.rank == 0:
        if not (out / CHECKPOINT).exists():  # it came, at its end, as a portable one
            training.save()
        log.info("the training is over, at step %d; jobs.export_restorer makes weights of it", training.step)
    return training


def _run(
    training: Training,
    sources: Sources,
    held_out: Sources,
    diary: Diary | None,
    loaders: int,
    deadline: float,
) -> None:
    """The loop; `diary` is that of the first process."""
    config, group = training.config, training.group
    for part, name in ((sources, "training"), (held_out, "validation")):
        count = len(part.clean.names) if part.clean is not None else 0
        log.info("%s: %d photographs, %d pairs", name, count, sum(len(pairs.names) for pairs in part.pairs.values()))
    if training.step:
        log.info("resumed at step %d", training.step)
    tell_if_changed(training.inventory, sources.inventory)
    training.inventory = sources.inventory

    def places() -> Iterator[tuple[int, Phase]]:
        """Step by step, looked at as far ahead as the loader goes."""
        for step in itertools.count(training.step):
            yield step, config.phase_at(config.progress(step, training.seconds))

    def validate() -> None:
        assert diary is not None
        found, sheet = training.validate(held_out)
        line = ", ".join(f"{label} {after:.2f} dB ({after - before:+.2f})" for label, (before, after) in found.items())
        diary.validation(training.step, line, {f"PSNR/{k}": after for k, (_, after) in found.items()}, sheet)

    ahead = Ahead(iter(batches(training, sources, places(), loaders=loaders)), training.device)
    run(
        training,
        lambda: training.learn(ahead.take(), ahead.meanwhile),
        validate,
        diary=diary,
        group=group,
        deadline=deadline,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of a host that has none of the other commands' libraries."""
    help_text = "faster steps after minutes of compiling; needs a C++ compiler"
    more: dict[str, Any] = {"compile": {"action": "store_true", "dest": "compiled", "help": help_text}}
    options = read_arguments(str(__doc__), argv, **more)
    config, out = options.pop("config"), options.pop("out")
    run_as_command(lambda: train(read_config(RestorerTraining, config), out, **options))


if __name__ == "__main__":
    main()
