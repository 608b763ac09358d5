"""Processes that train one network together."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """The processes that train together, each on its part of every batch: this one alone unless torch has others."""

    def __init__(self, device: torch.device) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.device = device

    def __str__(self) -> str:
        return f" on worker {self.rank + 1} of {self.size}" if self.size > 1 else ""

    @property
    def part(self) -> slice:
        """Of each batch."""
        return slice(self.rank, None, self.size)

    def average_gradients(self, parameters: Iterable[Tensor], *, samples: int) -> None:
        """Leaves every process with the gradient of the whole batch, of which it has that of the mean of `samples`."""
        if self.size > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            sizes = [gradient.numel() for gradient in gradients]
            flat = torch.cat([gradient.flatten() for gradient in gradients] + [torch.ones(1, device=self.device)])
            flat *= samples
            dist.all_reduce(flat)
            for gradient, mean in zip(gradients, torch.split(flat[:-1] / flat[-1], sizes), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def first_says(self, value: float) -> float:
        """The value that the first process has: clocks differ."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return float(told)
