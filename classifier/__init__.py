"""What is wrong with a photograph: labels, calibrated predictions, noise level."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from classifier.errors import ClassifierWeightsError
from classifier.labels import LABELS, Degradation

if TYPE_CHECKING:
    import torch

    from classifier.base import Classifier

__all__ = [
    "CLIP_PREFIX",
    "LABELS",
    "ClassifierWeightsError",
    "Degradation",
    "classifier_sha256",
    "load_classifier",
]

CLIP_PREFIX = "clip:"
"""Before the path of CLIP weights, where a classifier is named."""


def load_classifier(name_or_path: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Classifier:
    """A classifier of H x W x 3 uint8 RGB images; nothing is downloaded.

    torch and the networks' libraries are imported on the first call, so that labels and limits stay cheap to import.

    Args:
        name_or_path: a shipped name, a weights file, or `clip:PATH` of CLIP weights for zero-shot.
        device: `cpu`, `cuda` or one CUDA device.
        dtype: of the backbones, float32 or bfloat16; float32 if not given.

    Raises:
        ClassifierWeightsError: the file is not there, is none that can be used, or is damaged.
        ValueError: another device or dtype, or CUDA asked for where there is none.
    """
    import torch

    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, not {device}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("CUDA was asked for, but torch finds no CUDA device here; use device='cpu'")
    dtype = dtype or torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    if isinstance(name_or_path, str) and name_or_path.startswith(CLIP_PREFIX):
        from classifier.clip_classifier import ClipClassifier

        return ClipClassifier(Path(name_or_path.removeprefix(CLIP_PREFIX)), device=device, dtype=dtype)
    from classifier.timm_classifier import TimmClassifier
    from classifier.weights import load_weights

    return TimmClassifier(load_weights(name_or_path), device=device, dtype=dtype)


def classifier_sha256(name_or_path: str | Path) -> str:
    """The `sha256` that `load_classifier` gives; of our weights files found without building their network.

    Raises:
        ClassifierWeightsError: as `load_classifier`, but for weights that do not fit the architecture they name.
    """
    if isinstance(name_or_path, str) and name_or_path.startswith(CLIP_PREFIX):
        return load_classifier(name_or_path).sha256
    from classifier.files import read_weights_file

    return read_weights_file(name_or_path).sha256
