"""Our safetensors files: tensors, and metadata that says what they are. Strict in reading, atomic in writing."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.errors import WeightsError

FORMAT_VERSION = 1


def read_container(path: Path, *, expected_format: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of `expected_format`; raises WeightsError for every fault of the container."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a safetensors file, or is cut short: {error}") from error
    if (found := metadata_entry(path, metadata, "format")) != expected_format:
        raise WeightsError(f"{path} is of format {found!r}, not {expected_format!r}")
    if (version := metadata_entry(path, metadata, "format_version")) != str(FORMAT_VERSION):
        raise WeightsError(
            f"{path} is of format version {version}; this release reads {FORMAT_VERSION}: update dfpir or export again"
        )
    return metadata, tensors


def write_container(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and metadata, whole or not at all."""
    partial = Path(path).with_name(Path(path).name + ".partial")
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    # `save_file` would leave a file that its owner alone may read.
    try:
        partial.write_bytes(safetensors.torch.save(contiguous, {"format_version": str(FORMAT_VERSION), **metadata}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def metadata_entry(path: Path, metadata: Mapping[str, str], key: str) -> str:
    """A value of the metadata; raises WeightsError where it is missing."""
    if key not in metadata:
        raise WeightsError(f"{path} lacks {key!r} in its metadata; was it written by dfpir?")
    return metadata[key]


def metadata_json(path: Path, metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """A value of the metadata, parsed; raises WeightsError unless it is JSON of the type `kind`."""
    text = metadata_entry(path, metadata, key)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: {key!r} in its metadata is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise WeightsError(f"{path}: {key!r} in its metadata is a {type(value).__name__}, not a {kind.__name__}")
    return value


def is_plain_float(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that networks are stored in."""
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return tensor.dtype in plain and tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises WeightsError naming the tensors that hold NaN or infinity."""
    if bad := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise WeightsError(f"{path}: weights that are not finite: {listed(bad)}")


def listed(names: Iterable[object]) -> str:
    """Names in one line, the first eight of them."""
    texts = [str(name) for name in names]
    shown = texts[:8]
    more = f" and {len(texts) - len(shown)} more" if len(texts) > len(shown) else ""
    return ", ".join(shown) + more if texts else "none"
