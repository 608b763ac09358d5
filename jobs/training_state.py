"""Checkpoints that a failure cannot spoil, and that only the training they belong to takes up again."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.errors import UsageError
from jobs.training_config import ConfigError, TrainingConfig, as_plain, differences, from_plain

CHECKPOINT = "checkpoint.pt"
PORTABLE = "portable.pt"
"""In a training's folder: all that it goes on from, and the weights that it may go on from elsewhere."""


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that a failure, a full disk for instance, leaves the previous one whole."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def averaged_weights(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a training's checkpoint, for another training to start from.

    Raises UsageError if the file is not there, or is none.
    """
    try:
        found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["average"]
    except (OSError, KeyError) as error:
        raise UsageError(f"start_from {path} is no checkpoint of a training: {error}") from error
    return found


def load_state(path: Path, config: TrainingConfig) -> dict[str, Any]:
    """A checkpoint of this configuration; fields that are newer than it count as their defaults.

    Raises:
        ConfigError: it belongs to another configuration; the fields that differ are named.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    stored = state["config"]
    with suppress(ValueError):  # a field that is no more: the differences name it
        stored = as_plain(from_plain(type(config), stored))
    if lines := differences(stored, as_plain(config)):
        raise ConfigError(f"{path} belongs to another training; choose another folder, or set back {'; '.join(lines)}")
    return state


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in float16, for a portable checkpoint; guidance layers, if trained, stay as they are.

    A rounded guidance reorders channels.
    """
    return {
        name: tensor.detach().to("cpu", tensor.dtype if "linear_layer" in name else torch.float16)
        for name, tensor in tensors.items()
    }
