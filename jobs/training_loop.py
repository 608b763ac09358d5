"""What the trainings of restorer and classifier have in common: the loop, and the command line of a bare host."""

import argparse
import logging
import math
import multiprocessing
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from jobs.errors import InterruptedBySignalError, TrainingError, UsageError
from jobs.signals import StopRequest, leave_interrupts_to_parent, stop_on_signals
from jobs.training_config import TrainingConfig, as_plain
from jobs.training_diary import Diary
from jobs.training_group import Group
from jobs.training_state import last_good
from models.memory import available_bytes, is_out_of_memory
from models.precision import fastest_dtype

log = logging.getLogger("training")

SAVE_EVERY_S = 300.0
"""Between checkpoints, each with a validation."""

Sample = TypeVar("Sample")


def mixed_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16, sums and weights in float32; all float32 where bfloat16 would be slower."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fastest_dtype(device) is torch.bfloat16)


def usable_device(name: str) -> torch.device:
    """The device of that name; raises UsageError if there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected cpu, cuda or one CUDA device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no CUDA device is visible here; use --device cpu")
    return device


def require_room(build: Callable[[], nn.Module], device: torch.device) -> None:
    """Raises UsageError for a network whose training does not fit into the free memory of a device, before it is made.

    Each parameter is there five times: weights, their average, gradient and the optimiser's two moments. What batches
    take comes on top, and is found out by the first of them.
    """
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    needed, free = 5 * 4 * parameters, available_bytes(device)
    if needed > free:
        raise UsageError(
            f"a network of {parameters:,} parameters takes {needed / 1e9:,.1f} GB to train, and {device} has "
            f"{free / 1e9:,.1f} GB free; choose a smaller one"
        )


def prefetch(samples: Dataset[Sample], places: Iterable[Any], *, loaders: int, **options: Any) -> DataLoader[Sample]:
    """The samples of each place in turn; `loaders` processes make them ahead, with 0 each is made when it is asked for.

    The processes are forked where the system can, so that they share the photographs in memory; begun in another way,
    each would be sent all of them. `options` are those of torch's loader.
    """
    forked = loaders > 0 and "fork" in multiprocessing.get_all_start_methods()
    return DataLoader(
        samples,
        batch_size=None,
        sampler=places,
        num_workers=loaders,
        worker_init_fn=leave_interrupts_to_parent,
        multiprocessing_context="fork" if forked else None,
        **options,
    )


class TrainingRun(ABC):
    """A training in progress, in a folder: a network with its moving average and optimiser."""

    network: nn.Module
    average: nn.Module
    optimiser: torch.optim.Optimizer

    def __init__(self, config: TrainingConfig, out: Path, device: torch.device) -> None:
        self.config, self.out, self.device = config, out, device
        self.step, self.seconds = 0, 0.0
        self.inventory: str | None = None
        """Of the photographs that it has trained on; None: of none."""
        torch.manual_seed(config.seed)

    @property
    def progress(self) -> float:
        """How much of it is over, 0..1."""
        return self.config.progress(self.step, self.seconds)

    def place(self) -> dict[str, Any]:
        """Where it stands, for a checkpoint."""
        return {
            "config": as_plain(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "inventory": self.inventory,
        }

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        if "optimiser" in state:  # a portable one has none
            self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.inventory = state["step"], state["seconds"], state["inventory"]

    @abstractmethod
    def save(self) -> None:
        """Writes the checkpoint, and a portable one for other machines: weights and their average in float16."""


def run(
    training: TrainingRun,
    learn: Callable[[], float],
    validate: Callable[[], None],
    *,
    diary: Diary | None,
    group: Group,
    deadline: float,
    preparations: Iterable[Callable[[], object]] = (),
) -> None:
    """Learns step by step until the training is over, or until the call is.

    Args:
        training: knows how far it is.
        learn: takes a step and returns the loss.
        validate: by the first process, after a checkpoint.
        diary: of the first process; None in others.
        group: whose first process has the clock.
        deadline: of the call, by `time.monotonic`.
        preparations: come before the first step, as far as time and signals allow, and are no time of the training.

    Raises:
        InterruptedBySignalError: the first SIGINT, SIGTERM or SIGHUP ended it, after a checkpoint and without a
            validation; a second one acts at once.
        TrainingError: memory is full, a process that makes samples ended; or a photograph that is read again and again
            cannot be read any more. The first of several processes writes a checkpoint before the latter, if the
            photograph is one of its own.
    """

    def goes_on() -> bool:
        return training.progress < 1 and group.first_says(time.monotonic() - deadline) < 0

    def lost_photograph(fault: UsageError) -> TrainingError:
        return TrainingError(
            f"{fault}, at step {training.step}{group}; {last_good(training.out)}; take it away, with its "
            "partner if it has one, and the same command goes on"
        )

    def check() -> None:
        try:
            validate()
        except UsageError as fault:
            raise lost_photograph(fault) from fault

    # One of several processes must not leave the others waiting for it.
    with stop_on_signals() if group.size == 1 else nullcontext(StopRequest()) as request:
        for prepare in preparations:
            if request or not goes_on():
                break
            prepare()
        first, before, last_save = time.monotonic(), training.seconds, time.monotonic()
        first_step = training.step
        while goes_on() and not request:
            try:
                loss = learn()
            except UsageError as fault:
                if diary is not None:
                    training.save()
                raise lost_photograph(fault) from fault
            except (MemoryError, RuntimeError, ConnectionError, EOFError) as fault:
                if _is_of_loader(fault):
                    raise TrainingError(
                        f"a process that makes samples ended at step {training.step}{group} ({fault}); "
                        f"{last_good(training.out)}; if memory was full, try fewer --loaders"
                    ) from fault
                if not is_out_of_memory(fault):
                    raise
                raise TrainingError(
                    f"memory is full at step {training.step}{group}; {last_good(training.out)}; free some and the same "
                    "command goes on, or begin another training with smaller batches"
                ) from fault
            training.seconds = before + group.first_says(time.monotonic() - first)
            if diary is not None:
                rate = training.optimiser.param_groups[0]["lr"]
                diary.step(training.step, loss=loss, rate=rate, seconds=training.seconds, progress=training.progress)
                if time.monotonic() - last_save > SAVE_EVERY_S:
                    training.save()
                    check()
                    last_save = time.monotonic()
        if diary is not None:
            training.save()
            if training.step > first_step and not request:
                check()
    how = "over" if training.progress >= 1 else "stopped"
    log.info("%s at step %d, %.1f min", how, training.step, training.seconds / 60)
    if request.signal_number is not None:
        raise InterruptedBySignalError(request.signal_number)


def _is_of_loader(fault: Exception) -> bool:
    """Whether a process that makes samples is gone, as torch's loader tells it, or the pipe to it."""
    return isinstance(fault, ConnectionError | EOFError) or "DataLoader worker" in str(fault)


def read_arguments(description: str, argv: Sequence[str] | None, **more: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a training on a host that has none of the other commands' libraries; `more` are its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="configuration (.toml)")
    parser.add_argument("out", type=Path, help="folder of the training: checkpoints, logs, samples")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--loaders", type=int, default=0, help="processes that make samples ahead")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="of this call")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    arguments = vars(parser.parse_args(argv))
    for name in ("threads", "loaders", "max_minutes"):
        if arguments[name] < 0:
            parser.error(f"--{name.replace('_', '-')} is from 0 up, not {arguments[name]}")
    return arguments


def run_as_command(work: Callable[[], object]) -> None:
    """Does the work with its log on the terminal; a fault that a user can mend ends the process with its message."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        work()
    except (UsageError, TrainingError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError | OSError) else 1)
    except InterruptedBySignalError as error:
        print(error, file=sys.stderr)
        sys.exit(128 + error.signal_number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
