"""Batches: which images go through the network together, and what happens when a batch does not."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch

from models.memory import is_out_of_memory

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def batches(items: Sequence[T], *, key: Callable[[T], K], limit: Callable[[K], int]) -> Iterator[list[T]]:
    """Cuts items into batches of one key and at most `limit(key)` items; order is kept within a key."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for each, members in groups.items():
        size = max(1, limit(each))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def is_device_lost(error: Exception) -> bool:
    """Whether a CUDA call failed in a way that leaves the process's GPU unusable; full memory is none."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def in_halves(
    batch: Sequence[T],
    work: Callable[[Sequence[T]], None],
    *,
    on_fault: Callable[[T, Exception], None],
    on_halved: Callable[[Sequence[T], Exception], None] = lambda batch, error: None,
) -> None:
    """Works on a batch; if that fails, on its halves, down to single items: so a fault stays with its item.

    `on_fault` is told of an item that failed alone, `on_halved` of a batch that is about to be tried again in halves.
    Raises only what shows that the device is lost.
    """
    fault: Exception
    try:
        work(batch)
        return
    except Exception as error:
        if is_device_lost(error):
            raise
        # Without its traceback, which would keep the failed batch's tensors alive during the next try.
        fault = error.with_traceback(None)
    if len(batch) == 1:
        on_fault(batch[0], fault)
        return
    on_halved(batch, fault)
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        in_halves(half, work, on_fault=on_fault, on_halved=on_halved)
