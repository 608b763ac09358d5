"""A worker: shards in, images and committed rows out. It runs in a plain loop, a child process and a Ray actor alike."""

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from classifier import load_classifier
from classifier.base import Classifier, Prediction
from classifier.labels import Degradation
from classifier.sigma import estimate_sigma
from models import load_restorer
from models.prompts import PromptBank
from pipeline.batching import batches, in_halves, is_out_of_memory, padded
from pipeline.faults import fault_point
from pipeline.images import Pixels
from pipeline.item import Item
from pipeline.journal import Journal
from pipeline.outputs import ReferenceIndex
from pipeline.prompting import decide
from pipeline.records import ImageRef, Outcome, Shard, Stage, Status
from pipeline.run_config import RunContext
from pipeline.sink import RunDirectory
from pipeline.stages import load, measure_input, measure_result, write

WINDOW_IMAGES = 16
"""Decoded images among which batches are formed."""
WINDOW_PIXELS = 32_000_000
"""Decoded pixels from which a window is full, however few images it has."""
READERS, WRITERS = 2, 2

OnOutcomes = Callable[[list[Outcome]], None]

_log = logging.getLogger(__name__)


class ImageRestorer(Protocol):
    """What the worker needs of `models.Restorer`."""

    name: str
    prompts: PromptBank
    size_multiple: int

    def restore(self, images: Sequence[Pixels], prompt_keys: Sequence[str]) -> list[Pixels]: ...

    def batch_limit(self, height: int, width: int) -> int: ...

    def tile_px_for(self, height: int, width: int) -> int | None: ...


class Ledger:
    """Rows on their way into the manifest: reported when an image is done, committed every so often."""

    def __init__(self, directory: RunDirectory, shard_id: str, on_outcomes: OnOutcomes, every_s: float) -> None:
        self._directory, self._shard_id = directory, shard_id
        self._on_outcomes, self._every_s = on_outcomes, every_s
        self._rows: list[Outcome] = []
        self._last_commit = time.monotonic()

    def add(self, row: Outcome) -> None:
        """Takes the row of an image whose output, if any, has its final name."""
        self._rows.append(row)
        self._on_outcomes([row])
        if time.monotonic() - self._last_commit >= self._every_s:
            self.commit()

    def commit(self) -> None:
        """Makes the rows taken so far count."""
        if self._rows:
            self._directory.commit_part(self._shard_id, self._rows)
            self._rows = []
        self._last_commit = time.monotonic()


class Worker:
    """Classifies and restores shards with weights that are loaded once."""

    def __init__(
        self, context: RunContext, *, restorer: ImageRestorer, classifier: Classifier | None, worker_id: str
    ) -> None:
        """`classifier` may be None when the run's label is forced."""
        if classifier is None and context.config.label == "auto":
            raise ValueError("a run with --label auto needs a classifier")
        self._context, self._config = context, context.config
        self._restorer, self._classifier, self._worker_id = restorer, classifier, worker_id
        self._directory = RunDirectory(context.run_dir)
        self._source_root = Path(context.source_root)
        reference = context.config.reference
        self._references = ReferenceIndex(Path(reference)) if reference is not None else None
        self._host = socket.gethostname()
        self._stop = threading.Event()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` has been called: shards then come back unfinished."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Asks the running call to finish what is in work, commit and return; from any thread or signal handler."""
        self._stop.set()

    def __call__(self, shard: Shard, *, attempt: int, on_outcomes: OnOutcomes) -> None:
        """Gives every image of the shard that has none yet a row, and commits the rows.

        From the second attempt on images go one at a time, with the journal saying which one is in hand.
        `on_outcomes` is called with each image as it is done, from this thread. Returns early after `stop`.
        Raises OSError when results cannot be committed, and ShardBusyError when another process has the shard.
        """
        with self._directory.shard_lock(shard.shard_id):
            committed = self._directory.committed(shard.shard_id)
            todo = [ref for ref in shard.images if (ref.image_id, ref.revision) not in committed]
            journal = Journal(self._directory.journal_dir, shard.shard_id)
            ledger = Ledger(self._directory, shard.shard_id, on_outcomes, self._context.commit_every_s)
            base = self._base_facts(shard.shard_id, attempt)
            if attempt > 1 or not journal.is_empty:
                self._go_carefully(todo, base, journal, ledger)
            else:
                self._go_overlapped(todo, base, ledger)
            ledger.commit()
            if not self.is_stopping:
                journal.remove()

    def _go_overlapped(self, refs: Sequence[ImageRef], base: dict[str, object], ledger: Ledger) -> None:
        """Reads ahead, computes, and writes behind, each in threads of its own."""
        with ThreadPoolExecutor(READERS, "read") as readers, ThreadPoolExecutor(WRITERS, "write") as writers:
            finishing: deque[Future[Item]] = deque()
            try:
                for window in self._windows(refs, base, readers):
                    for batch in self._prepared_batches(window):
                        self._restore(batch)
                        self._finish_behind(batch, writers, finishing, ledger)
                        if self.is_stopping:
                            break
                    if self.is_stopping:
                        break
            finally:
                readers.shutdown(wait=False, cancel_futures=True)
            while finishing:
                ledger.add(finishing.popleft().result().outcome())

    def _windows(
        self, refs: Sequence[ImageRef], base: dict[str, object], readers: ThreadPoolExecutor
    ) -> Iterator[list[Item]]:
        """Loaded images, some at a time; the next ones are read meanwhile, as long as they are not too large."""
        waiting, ahead = deque(refs), deque[Future[Item]]()

        def read_ahead() -> None:
            ready = sum(_pixels(future.result()) for future in ahead if future.done())
            while waiting and len(ahead) < WINDOW_IMAGES and (ready < WINDOW_PIXELS or not ahead):
                ahead.append(readers.submit(self._load, waiting.popleft(), base))

        window: list[Item] = []
        read_ahead()
        while ahead:
            window.append(ahead.popleft().result())
            read_ahead()
            if len(window) == WINDOW_IMAGES or sum(map(_pixels, window)) >= WINDOW_PIXELS or not ahead:
                yield window
                window = []
                read_ahead()

    def _finish_behind(
        self, batch: Sequence[Item], writers: ThreadPoolExecutor, finishing: deque[Future[Item]], ledger: Ledger
    ) -> None:
        """Hands a batch to the writers, and books what they are done with; waits when they are far behind."""
        finishing.extend(writers.submit(self._finish, item) for item in batch)
        while finishing and (finishing[0].done() or len(finishing) > WINDOW_IMAGES):
            ledger.add(finishing.popleft().result().outcome())

    def _go_carefully(
        self, refs: Sequence[ImageRef], base: dict[str, object], journal: Journal, ledger: Ledger
    ) -> None:
        """One image at a time; suspects come last and after a commit, so that their deaths cost others nothing."""
        journal.count_death()
        for ref in sorted(refs, key=lambda ref: journal.deaths(ref.image_id)):
            if self.is_stopping:
                return
            if journal.is_poison(ref.image_id):
                ledger.add(self._quarantined(ref, base, journal.deaths(ref.image_id)))
                continue
            if journal.deaths(ref.image_id):
                ledger.commit()
            journal.begin(ref.image_id)
            try:
                item = self._load(ref, base)
                for batch in self._prepared_batches([item]):
                    self._restore(batch)
                self._finish(item)
            finally:
                # An exception that gets here is of the machinery, and no image's fault.
                journal.end()
            ledger.add(item.outcome())

    def _load(self, ref: ImageRef, base: dict[str, object]) -> Item:
        item = Item(ref, dict(base, started_at=datetime.now(UTC)))
        load(item, self._config)
        measure_input(item, self._references, self._config)
        return item

    def _prepared_batches(self, window: list[Item]) -> Iterator[list[Item]]:
        """Decides on each image of a window, then cuts it into batches; images that skip the network come first."""
        self._classify([item for item in window if not item.has_failed])
        aside = [item for item in window if item.status is not Status.RESTORED]
        if aside:
            yield aside
        multiple = self._restorer.size_multiple

        def shape(item: Item) -> tuple[int, int, str]:
            pixels = item.decoded().pixels
            return padded(pixels.shape[0], multiple), padded(pixels.shape[1], multiple), str(pixels.dtype)

        to_restore = [item for item in window if item.status is Status.RESTORED]
        yield from batches(to_restore, key=shape, limit=lambda key: self._restorer.batch_limit(key[0], key[1]))

    def _classify(self, items: list[Item]) -> None:
        """Notes label, decision and prompt of each."""
        if not items:
            return

        def work(batch: Sequence[Item]) -> None:
            started = time.perf_counter()
            predictions: Sequence[Prediction | None] = [None] * len(batch)
            if self._config.label == "auto" and self._classifier is not None:
                predictions = self._classifier.predict([item.seen() for item in batch])
            for item, prediction in zip(batch, predictions, strict=True):
                self._decide(item, prediction)
            for item in batch:
                item.add_ms(Stage.CLASSIFY, (time.perf_counter() - started) * 1000 / len(batch))

        in_halves(
            items,
            work,
            on_halved=lambda batch, error: None,
            on_fault=lambda item, error: item.fail(Stage.CLASSIFY, error),
        )

    def _decide(self, item: Item, prediction: Prediction | None) -> None:
        raise NotImplementedError

    def _restore(self, batch: Sequence[Item]) -> None:
        """Restores a batch of one padded shape, in smaller ones when memory runs out or an image is at fault."""
        batch = [item for item in batch if item.status is Status.RESTORED]
        if not batch:
            return
        height, width = batch[0].decoded().pixels.shape[:2]
        tile_px = self._restorer.tile_px_for(height, width)

        def work(part: Sequence[Item]) -> None:
            started = time.perf_counter()
            for item in part:
                fault_point("restore", item.ref.relative_path)
            images, prompts = [item.decoded().pixels for item in part], [str(item.facts["prompt"]) for item in part]
            results = self._restorer.restore(images, prompts)
            each_ms = (time.perf_counter() - started) * 1000 / len(part)
            for item, result in zip(part, results, strict=True):
                item.restored = result
                item.add_ms(Stage.RESTORE, each_ms)
                item.facts.update(batch_size=len(part), tiled=tile_px is not None, tile_px=tile_px)

        def on_halved(part: Sequence[Item], error: Exception) -> None:
            if is_out_of_memory(error):
                for item in part:
                    item.facts["oom_retries"] = item.facts["oom_retries"] + 1
                if self._context.device == "cuda":
                    torch.cuda.empty_cache()

        in_halves(batch, work, on_halved=on_halved, on_fault=lambda item, error: item.fail(Stage.RESTORE, error))
        self._look_again([item for item in batch if item.restored is not None])

    def _look_again(self, items: list[Item]) -> None:
        """What the classifier says of the results: little work beside restoring them."""
        raise NotImplementedError

    def _finish(self, item: Item) -> Item:
        measure_result(item)
        write(item, self._directory, self._config, self._source_root)
        # Only the row is still needed, and rows may wait for a minute.
        item.data, item.image, item.view, item.reference, item.restored = b"", None, None, None, None
        return item
