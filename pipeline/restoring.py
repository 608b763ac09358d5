"""Batches of decided images through the restoration network."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from models.prompts import PromptBank
from pipeline.batching import batches, in_halves, is_out_of_memory, padded
from pipeline.faults import fault_point
from pipeline.item import Item
from pipeline.records import Stage


class ImageRestorer(Protocol):
    """What the pipeline needs of `models.Restorer`."""

    name: str
    prompts: PromptBank

    @property
    def size_multiple(self) -> int:
        """Sides are padded to multiples of this many pixels."""
        ...

    def restore(self, images: Sequence[NDArray[Any]], prompt_keys: Sequence[str]) -> list[NDArray[Any]]:
        """H x W x 3 images and one prompt key each; the same sizes and dtypes come back."""
        ...

    def batch_limit(self, height: int, width: int) -> int:
        """Images of that size that fit in one batch."""
        ...

    def tile_px_for(self, height: int, width: int) -> int | None:
        """Side of the tiles that an image of that size is cut into; None where it goes whole."""
        ...


class BatchRestorer:
    """Restores items in batches of one padded shape; one at fault fails alone, and full memory halves a batch."""

    def __init__(self, restorer: ImageRestorer, *, device: str) -> None:
        self._restorer, self._device = restorer, device

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Cuts items into batches that `__call__` takes."""
        multiple = self._restorer.size_multiple

        def shape(item: Item) -> tuple[int, int, str]:
            height, width = item.decoded().pixels.shape[:2]
            return padded(height, multiple), padded(width, multiple), str(item.decoded().pixels.dtype)

        return batches(items, key=shape, limit=lambda key: self._restorer.batch_limit(key[0], key[1]))

    def __call__(self, batch: Sequence[Item]) -> None:
        """Fills in `restored`, or the fault, of each."""
        if batch:
            in_halves(
                batch,
                self._restore,
                on_halved=self._note_halved,
                on_fault=lambda item, error: item.fail(Stage.RESTORE, error),
            )

    def _restore(self, batch: Sequence[Item]) -> None:
        started = time.perf_counter()
        for item in batch:
            fault_point("restore", item.ref.relative_path)
        images = [item.decoded().pixels for item in batch]
        results = self._restorer.restore(images, [str(item.facts["prompt"]) for item in batch])
        each_ms = (time.perf_counter() - started) * 1000 / len(batch)
        for item, result in zip(batch, results, strict=True):
            tile_px = self._restorer.tile_px_for(item.decoded().height, item.decoded().width)
            item.restored = result
            item.add_ms(Stage.RESTORE, each_ms)
            item.facts.setdefault("oom_retries", 0)
            item.facts.update(batch_size=len(batch), tiled=tile_px is not None, tile_px=tile_px)

    def _note_halved(self, batch: Sequence[Item], error: Exception) -> None:
        if is_out_of_memory(error):
            for item in batch:
                item.facts["oom_retries"] = item.facts.get("oom_retries", 0) + 1
            if self._device == "cuda":
                torch.cuda.empty_cache()
