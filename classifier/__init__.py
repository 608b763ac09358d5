"""What is wrong with a photograph: labels, calibrated predictions, noise level."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from classifier.timm_classifier import TimmClassifier

__all__ = ["load_classifier"]


def load_classifier(
    name_or_path: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> TimmClassifier:
    """The classifier of a shipped name or of a weights file; nothing is downloaded.

    Its backbones run in `dtype`, which is float32 if not given.
    torch and timm are imported on the first call, so that labels and limits stay cheap to import.

    Raises:
        ClassifierWeightsError: the file is not there, is none of ours, or is damaged.
    """
    import torch

    from classifier.timm_classifier import load_classifier as load

    return load(name_or_path, device=device, dtype=dtype or torch.float32)
