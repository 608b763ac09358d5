"""What the local and the Ray runner share beside the dispatcher of shards."""

import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from jobs.dispatcher import Assignment, Ending
from jobs.text import harmless
from pipeline.records import OnOutcomes, Shard
from pipeline.run_config import RunContext
from pipeline.sink import ShardBusyError

if TYPE_CHECKING:
    from pipeline.worker import Worker

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


def begin_stopping() -> float:
    """Tells who waits that workers finish what they have in hand, and returns until when, on the monotonic clock."""
    with suppress(OSError):  # nobody reads it any more
        print("dfpir: stopping as soon as what is in hand is done; a second signal ends at once", file=sys.stderr)
    return time.monotonic() + STOP_GRACE_S


class Runner(Protocol):
    """Works off shards: same shards, same rows, wherever it runs them."""

    def run(self, shards: Sequence[Shard], context: RunContext, *, on_outcomes: OnOutcomes) -> None:
        """Returns when every image of `shards` has a row in the manifest.

        `on_outcomes` is called in this process, once per image, as images get done (which may be before
        their rows are committed: the manifest is what counts). Raises RunError when the run cannot go on.
        """
        ...


def work_off(worker: "Worker", assignment: Assignment, on_outcomes: OnOutcomes) -> tuple[Ending, str]:
    """Has a worker work off a shard; says how that ended, and the fault if there is one.

    Raises what shows that the worker's GPU is lost: the next process finds it anew.
    """
    from pipeline.batching import is_device_lost
    from pipeline.worker import DoubtfulShardError

    is_final = assignment.doubted_by is not None
    try:
        worker(assignment.shard, attempt=assignment.attempt, is_final=is_final, on_outcomes=on_outcomes)
    except DoubtfulShardError:
        note_traceback()
        return "doubted", ""
    except ShardBusyError as error:
        return "busy", str(error)
    except Exception as error:
        if is_device_lost(error):
            raise
        note_traceback()
        return "failed", harmless(f"{type(error).__name__}: {error}")
    return "given_back" if worker.is_stopping else "done", ""


def note_traceback() -> None:
    """Writes the exception at hand into the log, if that has room: what ends a run may be a full disk."""
    with suppress(OSError):
        traceback.print_exc()


def log_to(path: Path) -> None:
    """Sends this process's stdout and stderr, those of native code included, to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
