"""The local runner: supervised child processes on this machine, without Ray."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from jobs.dispatcher import Assignment, Dispatcher, Ending
from jobs.errors import InterruptedBySignalError
from jobs.runner import begin_stopping, log_to, note_traceback, work_off, workers_per_gpu
from jobs.signals import OF_DRIVER, StopRequest, kept_from_children, stop_on_signals
from pipeline.records import OnOutcomes, Outcome, Shard
from pipeline.run_config import RunContext
from pipeline.sink import RunDirectory

POLL_S = 0.5
START_PATIENCE_S = 1800.0
"""How long a worker may load its weights: a disk that hangs has no end."""

PR_SET_PDEATHSIG = 1


def crew_size(context: RunContext, gpu_bytes: Sequence[int], *, max_workers: int | None, shards: int) -> int:
    """Child processes of a run; they divide this machine's CPUs, GPUs (of so much memory each) and memory."""
    room = 1
    if gpus := len(gpu_bytes):
        room = gpus * workers_per_gpu(context.threads // gpus, min(gpu_bytes), least_bytes=context.least_gpu_bytes)
    return max(1, min(max_workers or room, shards))


@dataclass(frozen=True)
class _Message:
    """From a child to the driver."""

    kind: Literal["ready", "start_failed", "outcomes"] | Ending
    outcomes: tuple[Outcome, ...] = ()
    fault: str = ""


class LocalRunner:
    """Works off shards in child processes that load the weights once each."""

    def __init__(self, *, max_workers: int | None = None) -> None:
        """`max_workers`: child processes; by default some per GPU, or one if the run is on the CPU."""
        self._max_workers = max_workers

    def run(self, shards: Sequence[Shard], context: RunContext, *, on_outcomes: OnOutcomes) -> None:
        """See `jobs.runner.Runner.run`."""
        gpu_bytes = _gpu_bytes() if context.device == "cuda" else []
        gpus = len(gpu_bytes)
        count = crew_size(context, gpu_bytes, max_workers=self._max_workers, shards=len(shards))
        context = replace(context, threads=max(1, context.threads // count), sharers=-(-count // max(1, gpus)))
        dispatcher = Dispatcher(shards, context, on_outcomes, workers=count)
        children: dict[int, _Child] = {}
        with stop_on_signals() as request:
            try:
                while not dispatcher.is_finished and not request:
                    for number in range(count):
                        wanted = len(children) < dispatcher.unassigned + _busy(children)
                        if wanted and number not in children and dispatcher.is_of_use(number):
                            children[number] = _Child(number, context, gpu=number % gpus if gpus else None)
                    _step(children, dispatcher)
                if request:
                    _wind_up(children, dispatcher, request)
            finally:
                for child in children.values():
                    child.dismiss()
                for child in children.values():  # all at once: a process with a GPU takes a second to end
                    child.join()


class _Child:
    """One worker process as the driver sees it."""

    def __init__(self, number: int, context: RunContext, *, gpu: int | None) -> None:
        self.number = number
        self.log = RunDirectory(context.run_dir).logs_dir / f"worker-{number}.log"
        self.is_ready = self.has_failed = False
        self._started = time.monotonic()
        self.assignment: Assignment | None = None
        # A spawned child has no copy of the driver's threads, locks and CUDA state.
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process: BaseProcess = spawn.Process(
            target=_child_main, args=(theirs, context, number, gpu, str(self.log), os.getpid()), daemon=True
        )
        with kept_from_children():
            self.process.start()
        theirs.close()

    def give(self, assignment: Assignment) -> None:
        """Sends a shard; a child that is dead by now is noticed by its sentinel."""
        self.assignment = assignment
        with suppress(BrokenPipeError):
            self.connection.send(assignment)

    @property
    def hangs(self) -> bool:
        """Whether it has been loading its weights for too long."""
        return not self.is_ready and time.monotonic() - self._started > START_PATIENCE_S

    def stop(self) -> None:
        """Asks for an orderly end."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGTERM)

    def dismiss(self) -> None:
        """Has the process end: an idle one by closing its pipe, else by force."""
        self.connection.close()
        if self.assignment is not None or not self.is_ready:
            self.process.kill()

    def join(self) -> None:
        """Waits for the end of a process that was dismissed."""
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _crew(children: dict[int, _Child], dispatcher: Dispatcher) -> dict[int, str | None]:
    """The workers that are ready, or may yet be, with their machine (see `Dispatcher.take`)."""
    return {number: "here" for number, each in children.items() if each.is_ready or dispatcher.may_start(number)}


def _others_work(number: int, children: dict[int, _Child], dispatcher: Dispatcher) -> bool:
    return bool(_crew(children, dispatcher).keys() - {number})


def _busy(children: dict[int, _Child]) -> int:
    return sum(child.assignment is not None for child in children.values())


def _step(children: dict[int, _Child], dispatcher: Dispatcher, *, give: bool = True) -> None:
    """Waits a moment for messages and deaths, acts on them, and hands out shards."""
    if give:
        for child in list(children.values()):
            if child.assignment is None and not dispatcher.is_of_use(child.number):
                child.dismiss()
                children.pop(child.number).join()
            elif child.is_ready and child.assignment is None:
                assignment = dispatcher.take(child.number, _crew(children, dispatcher))
                if assignment is not None:
                    child.give(assignment)
    for child in children.values():
        if child.hangs:
            child.process.kill()  # which its sentinel tells
    sources: list[Any] = [source for c in children.values() for source in (c.connection, c.process.sentinel)]
    for source in wait(sources, timeout=POLL_S):
        for child in list(children.values()):
            if source is child.connection:
                _drain(child, children, dispatcher)
            elif source == child.process.sentinel:
                _drain(child, children, dispatcher)
                del children[child.number]
                child.process.join()
                child.connection.close()
                _note_end(child, dispatcher, others_work=_others_work(child.number, children, dispatcher))


def _drain(child: _Child, children: dict[int, _Child], dispatcher: Dispatcher) -> None:
    """Acts on all that a child has said."""
    while not child.connection.closed:
        try:
            if not child.connection.poll():
                return
            message = child.connection.recv()
        except (EOFError, OSError):  # the latter where it was killed within a message
            # Its end is noticed by the sentinel; until then the pipe would be reported again and again.
            child.process.join(timeout=POLL_S)
            return
        _act(child, message, dispatcher, others_work=_others_work(child.number, children, dispatcher))


def _act(child: _Child, message: _Message, dispatcher: Dispatcher, *, others_work: bool) -> None:
    shard_id = child.assignment.shard.shard_id if child.assignment is not None else ""
    match message.kind:
        case "ready":
            child.is_ready = True
            dispatcher.worker_ready(child.number)
            return
        case "start_failed":
            child.has_failed = True  # its process ends by itself, and the end is not to be counted twice
            dispatcher.start_failed(child.number, message.fault, str(child.log), others_work=others_work)
            return
        case "outcomes":
            dispatcher.report(shard_id, list(message.outcomes))
            return
        case "given_back":
            child.is_ready, child.has_failed = False, True  # it ends now: no further shard, and no death
    dispatcher.ended(shard_id, message.kind, message.fault, str(child.log))
    child.assignment = None


def _note_end(child: _Child, dispatcher: Dispatcher, *, others_work: bool) -> None:
    """Books the death of a child that had a shard, or was not ready yet."""
    code = child.process.exitcode
    fault = f"{signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    if child.assignment is not None:
        dispatcher.died(child.assignment.shard.shard_id, fault, str(child.log))
    elif not child.is_ready and not child.has_failed:
        dispatcher.start_failed(child.number, fault, str(child.log), others_work=others_work)


def _wind_up(children: dict[int, _Child], dispatcher: Dispatcher, request: StopRequest) -> None:
    """Lets busy workers commit, then ends the run."""
    for child in children.values():
        if child.assignment is not None:
            child.stop()
    deadline = begin_stopping()
    while _busy(children) and time.monotonic() < deadline:
        _step(children, dispatcher, give=False)
    assert request.signal_number is not None
    raise InterruptedBySignalError(request.signal_number)


def _gpu_bytes() -> list[int]:
    """Memory of each GPU."""
    import torch

    from models.memory import total_bytes

    return [total_bytes(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]


# In the child


def _child_main(
    connection: Connection, context: RunContext, number: int, gpu: int | None, log: str, driver_pid: int
) -> None:
    """The life of a child: load the weights, then shard after shard until the pipe is closed."""
    _die_with(driver_pid)
    try:
        log_to(Path(log))
    except OSError as error:
        connection.send(_Message("start_failed", fault=f"{error.strerror}: {log}"))
        return
    # A terminal's signals reach the whole process group; only the driver decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible_gpu(gpu)

    from pipeline.worker import build_worker

    try:
        worker = build_worker(context, f"local-{number}")
    except Exception as error:
        note_traceback()
        connection.send(_Message("start_failed", fault=f"{type(error).__name__}: {error}"))
        return
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_DRIVER)
    if worker.is_stopping:  # before it took a shard, which would count a death
        connection.send(_Message("start_failed", fault="ended by SIGTERM"))
        return
    connection.send(_Message("ready"))
    while not worker.is_stopping:
        try:
            assignment: Assignment = connection.recv()
        except EOFError:
            return
        how, fault = work_off(worker, assignment, lambda rows: connection.send(_Message("outcomes", tuple(rows))))
        connection.send(_Message(how, fault=fault))


def _die_with(driver_pid: int) -> None:
    """Has the kernel kill this process when the driver dies (Linux); elsewhere the closed pipe ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != driver_pid:
            os._exit(1)


def _visible_gpu(index: int) -> str:
    """The index-th of the GPUs that this process may see, as CUDA_VISIBLE_DEVICES names it."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[index] if visible else str(index)
