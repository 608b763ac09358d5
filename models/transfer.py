"""Pixels to a device and back. A GPU copies page-locked memory by itself, while it computes and Python goes on."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.padding import pad_into


def _room(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a GPU reads and writes by itself; plain memory for a CPU, and where there is no more of it."""
    if device.type != "cuda":
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:  # a GPU that is lost will say so when it copies
        warnings.warn(f"models: no page-locked memory, copies are slower: {error}", stacklevel=3)
        return torch.empty(shape, dtype=dtype, device="cpu")


def upload(images: Sequence[NDArray[Any]], height: int, width: int, device: torch.device) -> Tensor:
    """Images of one dtype, mirrored up to one size, as B x H x W x C of that dtype on a device.

    On a GPU they are perhaps still under way, which torch's stream knows.
    """
    shape = len(images), height, width, images[0].shape[2]
    held = _room(shape, torch.from_numpy(np.empty(0, images[0].dtype)).dtype, device)
    for room, image in zip(held.numpy(), images, strict=True):
        pad_into(room, image)
    return held.to(device, non_blocking=True)


def download(images: Tensor) -> NDArray[Any]:
    """A device's tensor as an array, which shares the memory of one that lies here."""
    if images.device.type != "cuda":
        return images.numpy()
    held = _room(images.shape, images.dtype, images.device)
    held.copy_(images, non_blocking=True)
    # Asleep: as it is, a wait keeps a core busy that others may need.
    copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(images.device))
    copied.synchronize()
    return held.numpy()
