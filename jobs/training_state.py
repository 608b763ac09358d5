"""What both trainings share: the course of the learning rate, and checkpoints that a failure cannot spoil."""

import math
import os
from pathlib import Path
from typing import Any

import torch


def learning_rate(progress: float, *, peak: float) -> float:
    """Linear warm-up over the first 2 % of `progress` (0..1), then a cosine to a hundredth of the peak."""
    if progress < 0.02:
        return peak * (progress + 1e-3) / 0.02
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that a failure leaves the previous one whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
