"""The classifier's weights file: safetensors with all that is needed to rebuild and trust it.

Convolutions and linear layers are stored in float16; vectors (biases, batch norm) in float32, since a running
variance may lie below float16's range. A JSON card of the same name beside the file holds its sha256, licence,
size and measured quality.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from classifier.architecture import Architecture
from classifier.errors import ClassifierWeightsError
from classifier.files import FORMAT, WeightsFile, read_weights_file
from classifier.labels import LABELS, Degradation
from classifier.network import DegradationNetwork
from classifier.view import ViewSettings


@dataclass(frozen=True, kw_only=True)
class ClassifierWeights(WeightsFile):
    """A weights file with its network, which is in float32 and evaluation mode."""

    network: DegradationNetwork


def _stored(tensor: Tensor) -> Tensor:
    half = tensor.is_floating_point() and tensor.ndim > 1
    return tensor.detach().cpu().to(torch.float16 if half else tensor.dtype).contiguous()


def save_classifier(
    path: Path,
    network: DegradationNetwork,
    *,
    view: ViewSettings,
    temperature: float,
    thresholds: Mapping[Degradation, float],
    licence: str,
    provenance: Mapping[str, Any],
) -> None:
    """Writes a weights file; a failure leaves a previous one whole."""
    description = {
        "labels": [str(label) for label in LABELS],
        "architecture": asdict(network.architecture),
        "view": asdict(view),
        "temperature": temperature,
        "thresholds": {str(label): thresholds[label] for label in LABELS},
        "licence": licence,
        "provenance": dict(provenance),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    tensors = {name: _stored(tensor) for name, tensor in network.state_dict().items()}
    metadata = {"format": FORMAT, "classifier": json.dumps(description, sort_keys=True)}
    try:
        partial.write_bytes(save(tensors, metadata))  # `save_file` would leave a file that its owner alone may read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_card(path: Path, *, quality: Mapping[str, Any]) -> Path:
    """Writes the JSON card of a weights file beside it, with the quality that was measured, and returns its path."""
    weights = load_weights(path, check_card=False)
    card = {
        "name": path.stem,
        "sha256": weights.sha256,
        "size_bytes": path.stat().st_size,
        "parameters": sum(p.numel() for p in weights.network.parameters()),
        "licence": weights.licence,
        "quality": dict(quality),
    }
    card_path = path.with_suffix(".json")
    card_path.write_text(json.dumps(card, indent=2) + "\n")
    return card_path


def load_weights(name_or_path: str | Path, *, check_card: bool = True) -> ClassifierWeights:
    """Loads a weights file strictly; nothing is downloaded.

    Raises:
        ClassifierWeightsError: the file is not there, is none of ours, has another hash than its card says,
            does not fit the architecture it names, or has weights that are not finite.
    """
    file = read_weights_file(name_or_path, check_card=check_card)
    try:
        tensors = load_file(file.path)
        architecture = Architecture(**file.architecture)
        if not architecture.thumbnail_channels and file.view.thumbnail_px != file.view.crop_px:
            raise ValueError("crops and thumbnail go through one backbone, but differ in size")
        # Its random start is not to be noticed, and the program around may have set another device or dtype.
        with torch.random.fork_rng(devices=()), torch.device("cpu"):
            network = DegradationNetwork(architecture, crop_px=file.view.crop_px)
            if "small_output.weight" in tensors:
                network.small_output = nn.Linear(architecture.hidden, len(LABELS))
            network.float()
    except SafetensorError as error:
        raise ClassifierWeightsError(f"{file.path} is not a readable .safetensors file: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ClassifierWeightsError(f"{file.path} describes a network that cannot be built: {error}") from error
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in plain]:
        raise ClassifierWeightsError(f"{file.path} has weights of odd types: {shorten(', '.join(odd), 300)}")
    if infinite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ClassifierWeightsError(
            f"{file.path} has weights that are not finite: {shorten(', '.join(infinite), 300)}"
        )
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:  # names every key
        said = shorten(str(error), 400)
        raise ClassifierWeightsError(
            f"{file.path} does not fit the architecture it names; use a file as it was written: {said}"
        ) from error
    return ClassifierWeights(network=network.eval().requires_grad_(False), **vars(file))
