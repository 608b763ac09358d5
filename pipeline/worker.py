"""A worker: shards in, images and committed rows out. Runs in a plain loop, a child process and a Ray actor alike."""

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from classifier import load_classifier
from classifier.base import Classifier
from models import Restorer, load_restorer, parse_tile
from models.memory import keep_freed_memory
from models.precision import fastest_dtype
from pipeline.faults import fault_point
from pipeline.item import Item
from pipeline.journal import Journal
from pipeline.judge import Judge
from pipeline.outputs import ReferenceIndex
from pipeline.records import ImageRef, OnOutcomes, Outcome, Shard, Stage, Status
from pipeline.restoring import BatchRestorer
from pipeline.run_config import RunContext
from pipeline.sink import RunDirectory
from pipeline.stages import load, measure_input, measure_result, write
from pipeline.watchdog import Watchdog

WINDOW_IMAGES = {"cpu": 16, "cuda": 32}
"""Decoded images among which batches are formed, for a worker on a device; a GPU wants many of one shape at once."""
FIRST_WINDOW_IMAGES = 8
"""Of a shard; each further window has twice as many, up to those above."""
WINDOW_PIXELS = 32_000_000
"""Decoded pixels from which a window is full, however few images it has."""

BOOK_EVERY_S = 2.0
"""Rows are booked with the first batch that ends so long after the last ones, so that the classifier is asked about
several results at once."""

_log = logging.getLogger(__name__)


def codec_threads(device: str, cpus: int) -> int:
    """Threads that read and decode, and as many that encode and write, for a worker that has so many CPUs.

    Beside a network on the CPU two keep ahead of it. A GPU is faster than two encoders of PNG and leaves CPUs idle.
    """
    return 2 if device == "cpu" else max(2, cpus)


MACHINES_FAULTS = frozenset({"missing", "permission_denied", "unreadable", "out_of_memory"})
"""What an image fails with where a machine does not see it as others do, or has its memory full."""


class DoubtfulShardError(Exception):
    """Images of a shard failed with what may as well be this machine's fault."""


class Ledger:
    """Rows on their way into the manifest: reported when an image is done, committed every so often.

    Unless what is found is final, failures that may be this machine's are no rows: of an image that the submitting
    machine saw, with one of `MACHINES_FAULTS`.
    """

    def __init__(
        self, directory: RunDirectory, shard_id: str, on_outcomes: OnOutcomes, every_s: float, *, is_final: bool
    ) -> None:
        self._directory, self._shard_id = directory, shard_id
        self._on_outcomes, self._every_s, self._is_final = on_outcomes, every_s, is_final
        self._rows: list[Outcome] = []
        self._doubted: list[Outcome] = []
        self._last_commit = time.monotonic()

    def add(self, row: Outcome) -> None:
        """Takes the row of an image whose output, if any, has its final name."""
        if not self._is_final and row.error_class in MACHINES_FAULTS and row.source_modified is not None:
            self._doubted.append(row)
            return
        self._rows.append(row)
        self._on_outcomes([row])
        if time.monotonic() - self._last_commit >= self._every_s:
            self.commit()

    def set_aside(self, rows: list[Outcome]) -> None:
        """Takes rows that may end the run as soon as they are reported, which is after they count."""
        self._rows += rows
        self.commit()
        if rows:
            self._on_outcomes(rows)

    def commit(self) -> None:
        """Makes the rows taken so far count. If that fails their images are done again, but for those that do count."""
        rows, self._rows = self._rows, []  # a part may be there although an error is told, and no row may count twice
        if rows:
            self._directory.commit_part(self._shard_id, rows)
        self._last_commit = time.monotonic()

    def require_certainty(self) -> None:
        """Raises DoubtfulShardError if failures are no rows."""
        if self._doubted:
            message = self._doubted[-1].error_message
            raise DoubtfulShardError(f"{len(self._doubted)} images failed, the last one with: {message}")


class ReadAhead:
    """Loads images in their order, some ahead of need: as many as a window has, until they hold as many pixels.

    A load begins when another one ends, so that only those under way at that moment go beyond the limit of pixels.
    """

    def __init__(self, refs: Sequence[ImageRef], load: Callable[[ImageRef], Item], *, threads: int, most: int) -> None:
        """`most` is the number of images in a window."""
        self._waiting, self._load, self._threads, self._most = deque(refs), load, threads, most
        self._ahead = deque[Future[Item]]()
        self._readers = ThreadPoolExecutor(threads, "read")
        self._lock = threading.RLock()  # a load that has ended at once calls back from within `_begin`

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._waiting.clear()
        self._readers.shutdown(cancel_futures=True)

    @property
    def is_empty(self) -> bool:
        """Whether every image has been handed out."""
        return not self._ahead and not self._waiting

    def next(self) -> Item:
        """The next image, once it is loaded. Raises what loading it raised; IndexError after the last."""
        with self._lock:
            future = self._ahead.popleft()
            self._begin()
        return future.result()

    def _begin(self) -> None:
        with self._lock:
            if not self._waiting:
                return
            ended = [future for future in self._ahead if future.done()]
            held = sum(_pixels(future.result()) for future in ended if not future.exception())
            room = min(self._most - len(self._ahead), self._threads - (len(self._ahead) - len(ended)))
            room = min(room, len(self._waiting)) if held < WINDOW_PIXELS else 0
            begun = [self._readers.submit(self._load, self._waiting.popleft()) for _ in range(room)]
            self._ahead.extend(begun)
        for future in begun:
            future.add_done_callback(lambda _: self._begin())


class Worker:
    """Classifies and restores shards with weights that are loaded once."""

    def __init__(
        self, context: RunContext, *, restorer: Restorer, classifier: Classifier | None, worker_id: str
    ) -> None:
        """`classifier` may be None when the run's label is forced."""
        self._context, self._config = context, context.config
        self._judge = Judge(context.config, classifier=classifier, prompts=restorer.prompts.keys)
        self._restoring = BatchRestorer(restorer, device=context.device)
        self._window = WINDOW_IMAGES[context.device]
        self._threads = codec_threads(context.device, context.threads)
        # A GPU leaves the CPUs idle: there the threads that read and write take what the classifier sees of an image.
        self._threads_look = context.device == "cuda"
        self._directory = RunDirectory(context.run_dir)
        reference = context.config.reference
        self._references = ReferenceIndex(Path(reference)) if reference is not None else None
        self._watchdog = Watchdog(context.patience_s)
        self._stop = threading.Event()
        self._last_booking = 0.0
        self._facts: dict[str, Any] = {
            "worker_id": worker_id,
            "host": socket.gethostname(),
            "device": context.device,
            "dtype": context.config.dtype,
            "classifier": self._judge.classifier_name,
            "label_source": "auto" if context.config.label == "auto" else "forced",
            "run_id": context.run_id,
            "config_digest": context.config.digest,
            "model": restorer.name,
            "weights_sha256": context.config.weights_sha256,
            "code_version": context.code_version,
        }

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` has been called: shards then come back unfinished."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Asks the running call to finish what is in work, commit and return; from any thread or signal handler."""
        self._stop.set()

    def __call__(self, shard: Shard, *, attempt: int, on_outcomes: OnOutcomes, is_final: bool = True) -> None:
        """Gives every image of the shard that has none yet a row, and commits the rows.

        From the second attempt on images go one at a time, with the journal saying which one is in hand.
        `on_outcomes` is called with each image as it is done, from this thread. Returns early after `stop`.
        Raises OSError when results cannot be committed, ShardBusyError when another process has the shard, and
        OtherRunError when the run's folder is gone. Unless what is found is final, DoubtfulShardError where images
        failed and that may be this machine's fault: these have no rows then.
        """
        self._directory.require_run(self._context.run_id)
        with self._directory.shard_lock(shard.shard_id), self._watchdog:
            committed = self._directory.committed(shard.shard_id)
            todo = [ref for ref in shard.images if (ref.image_id, ref.revision) not in committed]
            journal = Journal(self._directory.journal_dir, shard.shard_id)
            every_s = self._context.commit_every_s
            ledger = Ledger(self._directory, shard.shard_id, on_outcomes, every_s, is_final=is_final)
            base = dict(self._facts, shard_id=shard.shard_id, attempt=attempt)
            try:
                if attempt > 1 or not journal.is_empty:
                    self._go_carefully(todo, base, journal, ledger, shard)
                else:
                    self._go_overlapped(todo, base, ledger, shard)
            except Exception:
                with suppress(Exception):  # the disk may be what fails
                    ledger.commit()
                raise
            ledger.commit()
            if not self.is_stopping:
                ledger.require_certainty()
                journal.remove()

    def _go_overlapped(self, refs: Sequence[ImageRef], base: dict[str, Any], ledger: Ledger, shard: Shard) -> None:
        """Reads ahead, computes, and writes behind, each in threads of its own."""
        with (
            ThreadPoolExecutor(self._threads, "write") as writers,
            ReadAhead(
                refs, lambda ref: self._load(ref, base, shard), threads=self._threads, most=self._window
            ) as ahead,
        ):
            finishing: deque[_Writing] = deque()
            try:
                for window in self._windows(ahead):
                    for batch in self._prepared_batches(window):
                        if not self.is_stopping:
                            self._restore(batch)
                            self._finish_behind(batch, writers, finishing, ledger)
            except Exception:
                while finishing:  # what is written has its row all the same
                    with suppress(Exception):
                        self._book(finishing, ledger, least=1)
                raise
            while finishing:
                self._book(finishing, ledger, least=min(self._window, len(finishing)))

    def _windows(self, ahead: ReadAhead) -> Iterator[list[Item]]:
        """Loaded images, some at a time: few at first, so that the network soon has something to do."""
        window: list[Item] = []
        most, pixels = FIRST_WINDOW_IMAGES, 0
        while not ahead.is_empty and not self.is_stopping:
            item = ahead.next()
            window.append(item)
            pixels += _pixels(item)
            self._watchdog.headway()
            if len(window) == most or pixels >= WINDOW_PIXELS or ahead.is_empty:
                yield window
                window, most, pixels = [], min(2 * most, self._window), 0

    def _finish_behind(
        self, batch: Sequence[Item], writers: ThreadPoolExecutor, finishing: "deque[_Writing]", ledger: Ledger
    ) -> None:
        """Hands a batch to the writers, and books what they are done with; waits when they are far behind."""
        finishing.extend(_Writing(item, writers.submit(self._finish, item)) for item in batch)
        is_due = time.monotonic() - self._last_booking >= BOOK_EVERY_S and finishing[0].end.done()
        if is_due or len(finishing) > self._window:
            self._book(finishing, ledger, least=max(1, len(finishing) - self._window))
        while len(finishing) > self._threads and sum(_pixels(writing.item) for writing in finishing) > WINDOW_PIXELS:
            self._book(finishing, ledger, least=1)

    def _book(self, finishing: "deque[_Writing]", ledger: Ledger, *, least: int) -> None:
        """Waits for the images that have been with the writers longest, and takes the rows of all that are done."""
        self._last_booking = time.monotonic()
        finished: list[Item] = []
        try:
            while finishing and (len(finished) < least or finishing[0].end.done()):
                item, end = finishing.popleft()
                end.result()
                finished.append(item)
                self._watchdog.headway()
            self._judge.note_cleanness(finished)
        finally:
            for item in finished:
                ledger.add(item.outcome())

    def _go_carefully(
        self, refs: Sequence[ImageRef], base: dict[str, Any], journal: Journal, ledger: Ledger, shard: Shard
    ) -> None:
        """One image at a time; suspects come last and after a commit, so that their deaths cost others nothing."""
        journal.count_death()
        poison = [ref for ref in refs if journal.is_poison(ref.image_id)]
        for ref in sorted((ref for ref in refs if ref not in poison), key=lambda ref: journal.deaths(ref.image_id)):
            self._watchdog.headway()
            if self.is_stopping:
                return
            if journal.deaths(ref.image_id):
                ledger.commit()
            journal.begin(ref.image_id)
            try:
                item = self._load(ref, base, shard)
                for batch in self._prepared_batches([item]):
                    self._restore(batch)
                self._finish(item)
                self._judge.note_cleanness([item])
            finally:
                # An exception that gets here is of the machinery, and no image's fault.
                journal.end()
            ledger.add(item.outcome())
        ledger.set_aside([self._quarantined(ref, base, journal.deaths(ref.image_id)) for ref in poison])

    def _load(self, ref: ImageRef, base: dict[str, Any], shard: Shard) -> Item:
        item = Item(ref, dict(base, started_at=datetime.now(UTC)))
        load(item, self._config, source_root=self._context.source_root, shard=shard.images, directory=self._directory)
        measure_input(item, self._references, self._config)
        if self._threads_look and not item.has_failed:
            self._judge.look(item)
        return item

    def _prepared_batches(self, window: list[Item]) -> Iterator[list[Item]]:
        """Cuts a window of images, once they are decided on, into batches; those that skip the network come first."""
        if not self._threads_look:
            for item in window:
                if not item.has_failed:
                    self._judge.look(item)
        self._judge.decide([item for item in window if not item.has_failed])
        aside = [item for item in window if item.status is not Status.RESTORED]
        if aside:
            yield aside
        yield from self._restoring.batches([item for item in window if item.status is Status.RESTORED])

    def _restore(self, batch: Sequence[Item]) -> None:
        self._watchdog.headway(pixels=sum(map(_pixels, batch)))
        self._restoring([item for item in batch if item.status is Status.RESTORED])
        self._watchdog.headway()
        if not self._threads_look:
            for item in batch:
                self._judge.look_again(item)

    def _finish(self, item: Item) -> None:
        if self._threads_look:
            self._judge.look_again(item)
        measure_result(item)
        write(item, self._directory, self._config, reserved=self._context.reserved)
        item.facts["finished_at"] = datetime.now(UTC)
        item.drop_pixels()

    def _quarantined(self, ref: ImageRef, base: dict[str, Any], deaths: int) -> Outcome:
        item = Item(ref, dict(base, started_at=datetime.now(UTC)), status=Status.QUARANTINED)
        item.facts.update(
            stage=Stage.PROCESS,
            error_class="process_died",
            error_message=(
                f"the worker's process died {deaths} times with this image in hand, so it was set aside; "
                "the file may make a decoder crash or hang, or need more memory than there is"
            ),
        )
        return item.outcome()


def build_worker(context: RunContext, worker_id: str) -> Worker:
    """A worker with the weights that the run's configuration names.

    Raises the loaders' errors, and ValueError when a file's weights are not those the run was started with.
    """
    fault_point("start", worker_id)
    keep_freed_memory()
    # What is left to the CPU beside a GPU is done in many threads of the worker's own.
    torch.set_num_threads(1 if context.device == "cuda" else context.threads)
    config = context.config
    dtype = getattr(torch, config.dtype)
    if dtype is not torch.float32 and fastest_dtype(context.device) is torch.float32:
        _log.warning("this processor only imitates %s, which takes two to many times as long as float32", config.dtype)
    restorer = load_restorer(
        config.model, device=context.device, dtype=dtype, tile=parse_tile(config.tile), sharers=context.sharers
    )
    _check_same("model", config.model, restorer.sha256, config.weights_sha256)
    classifier: Classifier | None = None
    if config.label == "auto":
        classifier = load_classifier(config.classifier, device=context.device, dtype=dtype)
        _check_same("classifier", config.classifier, classifier.sha256, config.classifier_sha256)
    return Worker(context, restorer=restorer, classifier=classifier, worker_id=worker_id)


class _Writing(NamedTuple):
    """An item that is with the writers."""

    item: Item
    end: Future[None]


def _pixels(item: Item) -> int:
    """Decoded pixels that an item holds in memory."""
    image = item.image  # which a writer may let go of meanwhile
    return image.width * image.height if image is not None else 0


def _check_same(kind: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{kind} {name} has sha256 {found} here, but the run was started with {expected}: "
            "put the same file on every machine, or start a new run"
        )
