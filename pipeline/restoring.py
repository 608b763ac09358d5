"""Batches of decided images through the restoration network."""

import time
from collections.abc import Iterator, Sequence

import torch

from models.memory import is_out_of_memory
from models.padding import padded_size
from models.restorer import Restorer
from pipeline.batching import batches, in_halves, is_device_lost
from pipeline.faults import fault_point
from pipeline.images import as_grey_as
from pipeline.item import Item
from pipeline.records import Stage


class BatchRestorer:
    """Restores items in batches of one padded shape; one at fault fails alone.

    Full memory halves a batch, then cuts an image that is alone into ever smaller tiles, and only then fails it.
    """

    def __init__(self, restorer: Restorer, *, device: str) -> None:
        self._restorer, self._device = restorer, device

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Cuts items into batches that `__call__` takes."""

        def shape(item: Item) -> tuple[int, int, str, int | None]:
            height, width = padded_size(item.decoded().height, item.decoded().width, self._restorer.size_multiple)
            return height, width, str(item.decoded().pixels.dtype), self._tile_px(item)

        return batches(items, key=shape, limit=lambda key: self._restorer.batch_limit(key[0], key[1], tile_px=key[3]))

    def _tile_px(self, item: Item) -> int | None:
        return self._restorer.tile_px_for(item.decoded().height, item.decoded().width, str(item.facts["prompt"]))

    def __call__(self, batch: Sequence[Item]) -> None:
        """Fills in `restored`, or the fault, of each."""
        if batch:
            in_halves(batch, self._restore, on_halved=self._note_full_memory, on_fault=self._restore_in_tiles)

    def _restore_in_tiles(self, item: Item, error: Exception) -> None:
        """The last resort for an image that failed alone; anything but full memory is its fault at once.

        One that goes in tiles, several at a time, goes in the same ones singly at first.
        """
        height, width = item.decoded().pixels.shape[:2]
        tile_px = own = self._tile_px(item)
        while is_out_of_memory(error):
            if own is None:
                tile_px = self._restorer.smaller_tile_px(height, width, than=tile_px)
            own = None
            if tile_px is None:
                break
            self._note_full_memory([item], error)
            try:
                return self._restore([item], tile_px=tile_px)
            except Exception as another:
                if is_device_lost(another):
                    raise
                error = another.with_traceback(None)  # which would keep the tensors alive
        return item.fail(Stage.RESTORE, error)

    def _restore(self, batch: Sequence[Item], *, tile_px: int | None = None) -> None:
        started = time.perf_counter()
        for item in batch:
            fault_point("restore", item.ref.relative_path)
        images = [item.decoded().visible for item in batch]
        results = self._restorer.restore(images, [str(item.facts["prompt"]) for item in batch], tile_px=tile_px)
        each_ms = (time.perf_counter() - started) * 1000 / len(batch)
        for item, image, result in zip(batch, images, results, strict=True):
            side = tile_px or self._tile_px(item)
            item.restored = as_grey_as(image, result)
            item.add_ms(Stage.RESTORE, each_ms)
            item.facts.setdefault("oom_retries", 0)
            item.facts.update(batch_size=len(batch), tiled=side is not None, tile_px=side)
            if side is not None and side != self._restorer.windows_px.get(item.facts["prompt"]):
                item.warnings.append(f"restored in tiles of {side} px, whose brightness may differ")

    def _note_full_memory(self, batch: Sequence[Item], error: Exception) -> None:
        if is_out_of_memory(error):
            for item in batch:
                item.facts["oom_retries"] = item.facts.get("oom_retries", 0) + 1
            if self._device == "cuda":
                torch.cuda.empty_cache()
