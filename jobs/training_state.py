"""What trainings share: the course of the learning rate, and checkpoints that a failure cannot spoil."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.training_config import ConfigError, differences


def learning_rate(progress: float, *, peak: float, warm_up: float = 0.02) -> float:
    """Linear warm-up over a share of `progress` (0..1), then a cosine to a hundredth of the peak."""
    if progress < warm_up:
        return peak * (progress / warm_up + 0.01)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


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


def load_state(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of this configuration.

    Raises:
        ConfigError: it belongs to another configuration; the fields that differ are named.
    """
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if lines := differences(state["config"], config):
        raise ConfigError(f"{path} belongs to another training; choose another folder, or set back {'; '.join(lines)}")
    return state


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in float16, for a portable checkpoint."""
    return {name: tensor.detach().to("cpu", torch.float16) for name, tensor in tensors.items()}
