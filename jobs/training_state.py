"""Checkpoints that a failure cannot spoil, and that only the training they belong to takes up again."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from classifier.errors import ClassifierWeightsError
from jobs.errors import TrainingError, UsageError
from jobs.training_config import ConfigError, TrainingConfig, as_plain, differences, from_plain
from models.errors import WeightsError
from models.memory import is_out_of_memory

CHECKPOINT = "checkpoint.pt"
PORTABLE = "portable.pt"
"""In a training's folder: all that it goes on from, and the weights that it may go on from elsewhere."""


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that a failure leaves the previous one whole.

    Raises:
        TrainingError: it cannot be written, on a full disk for instance.
    """
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter where the disk has refused a part
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise TrainingError(f"{path} could not be written, {last_good(path.parent)}: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


def last_good(out: Path) -> str:
    """Where a training that fails may be taken up, for its message."""
    path = out / CHECKPOINT
    return f"last good checkpoint: {path}" if path.exists() else "there is no checkpoint yet"


def averaged_weights(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a training's checkpoint.

    Raises UsageError if the file is not there, or is none.
    """
    try:
        found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["average"]
    except MemoryError:
        raise
    except Exception as error:  # torch raises nearly anything on bytes that are no checkpoint
        raise UsageError(f"start_from {path} is no checkpoint of a training: {error}") from error
    return found


def start_from(network: nn.Module, source: Path, weights_of: Callable[[str], Mapping[str, Tensor]]) -> None:
    """Gives a network the averaged weights of another training's checkpoint (`.pt`), or those of a model.

    Args:
        network: takes the weights.
        source: the checkpoint, or the model's name or file.
        weights_of: the weights of a model by its name or file.

    Raises:
        UsageError: there are none, or they are of another network.
    """
    try:
        weights = averaged_weights(source) if source.suffix == ".pt" else weights_of(str(source))
    except (WeightsError, ClassifierWeightsError) as error:
        raise UsageError(f"start_from: {error}") from error
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:  # torch names every key; or what is none, or no weights
        raise UsageError(f"start_from {source} is of another network: {shorten(str(error), 300)}") from error


def config_digest(config: Mapping[str, Any]) -> str:
    """Of a plain configuration; part of the provenance of the weights that come of it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def require_target(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UsageError for a file that a training's weights and card are not to be written to, before anything is.

    Files that are there are replaced only by the training, of this plain configuration, that they came of.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: weights are written to files whose names end in .safetensors; choose another name")
    there = [str(each) for each in (path, path.with_suffix(".json")) if each.exists()]
    if there and config_digest(config) not in _metadata(path):
        raise UsageError(f"not of this training: {' and '.join(there)}; move it away, or choose another name")


def _metadata(path: Path) -> str:
    """All that a weights file says of itself; nothing if it is not there, or none."""
    try:
        with safe_open(path, framework="np") as file:
            return str(file.metadata())
    except (OSError, SafetensorError):
        return ""


def found_state(out: Path, config: TrainingConfig) -> dict[str, Any] | None:
    """What a training in this folder goes on from: its checkpoint, or else a portable one; None if there is neither.

    Fields that are newer than it count as their defaults.

    Raises:
        ConfigError: it belongs to another configuration; the fields that differ are named.
        UsageError: it cannot be read, or is no checkpoint of a training.
    """
    path = _found(out)
    if path is None:
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        stored, _ = state["config"], [state[name] for name in ("network", "average", "step", "seconds")]
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises nearly anything on bytes that are no checkpoint
        raise _unusable(path, error) from error
    with suppress(ValueError):  # a field that is no more: the differences name it
        stored = as_plain(from_plain(type(config), stored))
    if lines := differences(stored, as_plain(config)):
        raise ConfigError(f"{path} belongs to another training; choose another folder, or set back {'; '.join(lines)}")
    return state


def _found(out: Path) -> Path | None:
    return next((out / name for name in (CHECKPOINT, PORTABLE) if (out / name).exists()), None)


def _unusable(path: Path, error: Exception) -> UsageError:
    other = path.with_name(PORTABLE)
    advice = f"go on from {other.name}" if path != other and other.exists() else "begin anew"
    return UsageError(f"{path} is damaged or no such checkpoint; move it away to {advice}: {shorten(repr(error), 300)}")


@contextmanager
def resuming(out: Path) -> Iterator[None]:
    """While the state found in a folder is put into network and optimiser; raises UsageError if it does not fit."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(_found(out) or out, error) from error


def to_float16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in float16, for a portable checkpoint; integers and guidance layers stay as they are.

    A rounded guidance reorders channels.
    """

    def stored(name: str, tensor: Tensor) -> torch.dtype:
        return torch.float16 if tensor.is_floating_point() and "linear_layer" not in name else tensor.dtype

    return {name: tensor.detach().to("cpu", stored(name, tensor)) for name, tensor in tensors.items()}
