"""Pixels to a device and back. A GPU copies page-locked memory by itself, while it computes and Python goes on."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def _page_locked(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that a GPU reads and writes by itself; plain memory where the system gives no more of it."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:  # a GPU that is lost will say so when it copies
        warnings.warn(f"models: no page-locked memory, copies are slower: {error}", stacklevel=3)
        return torch.empty(shape, dtype=dtype)


def upload(image: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an image in its own dtype on a device; on a GPU perhaps still under way, which torch's stream knows."""
    if device.type != "cuda":
        return torch.tensor(np.ascontiguousarray(image)).to(device)
    held = _page_locked(image.shape, torch.from_numpy(np.empty(0, image.dtype)).dtype)
    np.copyto(held.numpy(), image)
    return held.to(device, non_blocking=True)


def download(images: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Contiguous images of one device as arrays; a GPU copies all of them before it is waited for, once."""
    if not images or images[0].device.type != "cuda":
        return [image.cpu().numpy() for image in images]
    held = [_page_locked(image.shape, image.dtype) for image in images]
    for there, image in zip(held, images, strict=True):
        there.copy_(image, non_blocking=True)
    torch.cuda.current_stream(images[0].device).synchronize()
    return [there.numpy() for there in held]
