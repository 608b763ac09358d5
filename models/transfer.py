"""Pixels to a device and back. A GPU copies page-locked memory by itself, while it computes and Python goes on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(image: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an image in its own dtype on a device; on a GPU perhaps still under way, which torch's stream knows."""
    if device.type != "cuda":
        return torch.tensor(np.ascontiguousarray(image)).to(device)
    held = torch.empty(image.shape, dtype=torch.from_numpy(np.empty(0, image.dtype)).dtype, pin_memory=True)
    np.copyto(held.numpy(), image)
    return held.to(device, non_blocking=True)


def download(images: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Contiguous images of one device as arrays; a GPU copies all of them before it is waited for, once."""
    if not images or images[0].device.type != "cuda":
        return [image.cpu().numpy() for image in images]
    held = [torch.empty(image.shape, dtype=image.dtype, pin_memory=True) for image in images]
    for there, image in zip(held, images, strict=True):
        there.copy_(image, non_blocking=True)
    torch.cuda.current_stream(images[0].device).synchronize()
    return [there.numpy() for there in held]
