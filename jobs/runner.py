"""What the local and the Ray runner share beside the dispatcher of shards."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pipeline.records import OnOutcomes, Shard
from pipeline.run_config import RunContext

STOP_GRACE_S = 300.0
"""How long workers may take to finish and commit what they have in hand once the run is to end."""

MOST_WORKERS_PER_GPU, CPUS_PER_WORKER = 8, 2

WHOLE_PIXELS = 36_000_000
"""Workers share a GPU if each of them still restores an image of this size whole: few of a large network."""


def workers_per_gpu(cpus: int, gpu_bytes: int, *, least_bytes: int) -> int:
    """How many processes share a GPU of so much memory that comes with so many CPUs, `least_bytes` for each.

    Reading, classifying and writing for a network that restores a thousand images a second is more than one Python
    process can do, however many threads it has.
    """
    return max(1, min(MOST_WORKERS_PER_GPU, cpus // CPUS_PER_WORKER, gpu_bytes // max(1, least_bytes)))


class Runner(Protocol):
    """Works off shards: same shards, same rows, wherever it runs them."""

    def run(self, shards: Sequence[Shard], context: RunContext, *, on_outcomes: OnOutcomes) -> None:
        """Returns when every image of `shards` has a row in the manifest.

        `on_outcomes` is called in this process, once per image, as images get done (which may be before
        their rows are committed: the manifest is what counts). Raises RunError when the run cannot go on.
        """
        ...


def note_traceback() -> None:
    """Writes the exception at hand into the log, if that has room: what ends a run may be a full disk."""
    with suppress(OSError):
        traceback.print_exc()


def log_to(path: Path) -> None:
    """Sends this process's stdout and stderr, those of native code included, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
