"""The Ray runner: one actor per worker, on a cluster or on one that is started for the run on this machine.

Ray schedules actors and tells of their deaths; it retries nothing (see `jobs.dispatcher.Dispatcher`).
"""

import logging
import os
import queue
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.dispatcher import Assignment, Dispatcher, Ending
from jobs.errors import InterruptedBySignalError, RunError
from jobs.ray_cluster import Needs, all_nodes, code_digest, connected, gpu_bytes, measure_room, require_code
from jobs.runner import begin_stopping, log_to, work_off
from jobs.signals import StopRequest, stop_on_signals
from pipeline.faults import fault_environment
from pipeline.records import OnOutcomes, Outcome, Shard
from pipeline.run_config import RunContext
from pipeline.sink import RunDirectory

if TYPE_CHECKING:
    from pipeline.worker import Worker

POLL_S = 1.0
PENDING_WARNING_S = 60.0

START_AWAITED_S = 60.0
"""How long a worker may load its weights while others leave it what one of them doubted or died over."""

LOSS_TOLD_WITHIN_S, DEATH_STANDS_AFTER_S = 30.0, 5.0
"""How long a dead worker's node may still be listed as living: Ray notices within about 10 s that a machine is lost,
and tells sooner of a process that died alone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Report:
    """What came of an assignment, and the outcomes not yet fetched."""

    kind: Ending
    fault: str
    outcomes: list[Outcome]


class WorkerActor:
    """A worker inside an actor; `outcomes` and `stop` run beside `work`, in a concurrency group of their own."""

    def __init__(
        self, context: RunContext, worker_id: str, log: str, environment: dict[str, str], code_digest: str
    ) -> None:
        require_code(code_digest)
        os.environ.update(environment)
        RunDirectory(context.run_dir).require_run(context.run_id)
        log_to(Path(log))
        self._context, self._worker_id = context, worker_id
        self._worker: Worker | None = None
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        # Ray's own handler would end the process before the rows of finished images are committed.
        signal.signal(signal.SIGTERM, lambda *_: self._end())

    def load(self) -> str:
        """Loads the weights and tells on which node.

        Here and not when the actor is made, which is in another thread than `work`: OpenMP gives each thread that
        computes helpers of its own, and once there are more of them than cores they sleep between operations, which
        halves the speed.
        """
        from pipeline.worker import build_worker

        self._worker = build_worker(self._context, self._worker_id)
        return str(ray.get_runtime_context().get_node_id())

    def work(self, assignment: Assignment) -> _Report:
        """Works off a shard."""
        assert self._worker is not None
        kind, fault = work_off(self._worker, assignment, self._keep)
        return _Report(kind, fault, self._take())

    # Called several times a second: noted as tasks, the calls would fill the memory of Ray's control store.
    @ray.method(concurrency_group="control", enable_task_events=False)
    def outcomes(self) -> list[Outcome]:
        """Images done since the last call; waits a moment for one."""
        try:
            first = self._outcomes.get(timeout=POLL_S)
        except queue.Empty:
            return []
        return [first, *self._take()]

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Has the current call commit what it has and return."""
        self._end()

    def _end(self) -> None:
        if self._worker is None:
            os._exit(1)  # nothing to commit yet
        self._worker.stop()

    def _keep(self, rows: list[Outcome]) -> None:
        for row in rows:
            self._outcomes.put(row)

    def _take(self) -> list[Outcome]:
        taken = []
        with suppress(queue.Empty):  # the other thread of calls takes some too
            while True:
                taken.append(self._outcomes.get_nowait())
        return taken


@dataclass(eq=False)
class _Member:
    """One actor as the driver sees it."""

    number: int
    actor: Any
    log: Path
    node_id: str | None = None
    """None until its weights are loaded."""
    assignment: Assignment | None = None
    pending: dict[Any, str] = field(default_factory=dict)
    """Calls under way, by object reference."""
    since: float = field(default_factory=time.monotonic)
    """When it was asked for."""


@dataclass(frozen=True)
class _Fallen:
    """A worker that died over a shard, until it is known whether its node did."""

    member: _Member
    error: RayError
    since: float = field(default_factory=time.monotonic)

    @property
    def is_dead_alone(self) -> bool:
        """Whether its node has been listed as living for long enough."""
        is_told = isinstance(self.error, OutOfMemoryError) or "worker process has died" in str(self.error)
        return time.monotonic() - self.since >= (DEATH_STANDS_AFTER_S if is_told else LOSS_TOLD_WITHIN_S)


class RayRunner:
    """Works off shards in Ray actors."""

    def __init__(self, *, address: str | None = None, max_workers: int | None = None) -> None:
        """`address` of a cluster; without one (and without RAY_ADDRESS) one is started here and ended again.

        `max_workers`: actors asked for; by default as many as the cluster has room for.
        """
        self._address, self._max_workers = address, max_workers

    def run(self, shards: Sequence[Shard], context: RunContext, *, on_outcomes: OnOutcomes) -> None:
        """See `jobs.runner.Runner.run`. Raises UsageError when the cluster lacks what a worker needs."""
        with connected(self._address, threads=context.threads):
            needs, room = measure_room(
                all_nodes(),
                device=context.device,
                threads=context.threads,
                gpu_bytes=gpu_bytes() if context.device == "cuda" else 0,
                least_bytes=context.least_gpu_bytes,
                wanted=min(self._max_workers or len(shards), len(shards)) or None,
            )
            context = replace(context, threads=needs.cpus, sharers=needs.sharers)
            dispatcher = Dispatcher(shards, context, on_outcomes, workers=self._max_workers or room)
            crew = _Crew(context, needs, dispatcher, room=room)
            # Ray has set its own handlers by now.
            with stop_on_signals() as request:
                try:
                    crew.work(request)
                except ModuleNotFoundError as error:  # of Ray's client server
                    raise RunError(f"the head of the Ray cluster needs the same dfpir as the nodes: {error}") from error
                except Exception as error:
                    if ray.is_initialized():
                        raise
                    raise RunError(  # as Ray's client is once the head is gone
                        f"the connection to the Ray cluster was lost ({error}); the same command goes on from here"
                    ) from error
                finally:
                    if ray.is_initialized():  # else Ray would start a cluster here
                        crew.dismiss()


class _Crew:
    """The actors of a run."""

    def __init__(self, context: RunContext, needs: Needs, dispatcher: Dispatcher, *, room: int) -> None:
        """`room`: actors that the cluster can hold as it is."""
        self._context, self._dispatcher, self._room = context, dispatcher, room
        self._logs = RunDirectory(context.run_dir).logs_dir
        self._code_digest = code_digest()
        self._members: dict[int, _Member] = {}
        self._fallen: list[_Fallen] = []
        self._homes: dict[int, str] = {}
        """Nodes on which workers have started, by their number."""
        self._nodes_seen = time.monotonic()
        self._waiting_since = time.monotonic()
        self._no_hiring_before = 0.0
        # Ray's type hints leave out concurrency groups.
        remote: Any = ray.remote
        self._actor_class = remote(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"control": 2},
        )(WorkerActor)

    def work(self, request: StopRequest) -> None:
        """Until every shard is done or the run is asked to end."""
        while not self._dispatcher.is_finished and not request:
            self._hire_as_wanted()
            for member in list(self._members.values()):
                if member.node_id is not None and member.assignment is None:
                    if self._dispatcher.is_of_use(member.number):
                        self._give(member)
                    else:
                        self._dismiss(member)
            self._step()
            self._book_fallen()
            self._warn_if_pending()
        if request:
            self._wind_up(request)

    def dismiss(self) -> None:
        """Ends all actors."""
        for member in list(self._members.values()):
            self._dismiss(member)

    def _dismiss(self, member: _Member) -> None:
        del self._members[member.number]
        ray.kill(member.actor, no_restart=True)

    def _busy(self) -> int:
        return sum(member.assignment is not None for member in self._members.values())

    def _hire_as_wanted(self) -> None:
        if time.monotonic() < self._no_hiring_before:
            return
        crew = min(self._dispatcher.workers, self._dispatcher.unassigned + self._busy() + len(self._fallen))
        wanted = crew - len(self._members)
        for number in range(self._dispatcher.workers):
            if wanted <= 0:
                break
            if number not in self._members and self._dispatcher.is_of_use(number):
                self._hire(number)
                wanted -= 1

    def _hire(self, number: int) -> None:
        log = self._logs / f"worker-{number}.log"
        # Where it has been before, if that is there: another node may be one on which nothing starts.
        home = self._homes.get(number)
        strategy = NodeAffinitySchedulingStrategy(home, soft=True) if home is not None else "DEFAULT"
        actor = self._actor_class.options(scheduling_strategy=strategy).remote(
            self._context, f"ray-{number}", str(log), fault_environment(), self._code_digest
        )
        member = self._members[number] = _Member(number, actor, log)
        member.pending[actor.load.remote()] = "load"

    def _give(self, member: _Member) -> None:
        crew: dict[int, str | None]
        crew = {each.number: each.node_id for each in self._members.values() if each.node_id is not None}
        if len(crew) < self._room:
            crew |= {each.number: None for each in self._members.values() if self._is_awaited(each)}
        member.assignment = self._dispatcher.take(member.number, crew)
        if member.assignment is not None:
            member.pending[member.actor.work.remote(member.assignment)] = "work"
            if "outcomes" not in member.pending.values():
                member.pending[member.actor.outcomes.remote()] = "outcomes"

    def _is_awaited(self, member: _Member) -> bool:
        """Whether a worker that is not ready may soon be, on whichever machine."""
        is_late = time.monotonic() - member.since > START_AWAITED_S
        return member.node_id is None and self._dispatcher.may_start(member.number) and not is_late

    def _step(self) -> None:
        """Waits a moment for answers and deaths, and acts on them."""
        pending = {reference: member for member in self._members.values() for reference in member.pending}
        if not pending:
            time.sleep(POLL_S)
            return
        # A worker that is done waits for its next shard: the first answer is acted on at once.
        first, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_S)
        for reference in first and ray.wait(list(pending), num_returns=len(pending), timeout=0)[0]:
            member = pending[reference]
            if self._members.get(member.number) is member:
                self._act(member, reference)

    def _act(self, member: _Member, reference: Any) -> None:
        call = member.pending.pop(reference)
        try:
            answer = ray.get(reference)
        except RayError as error:
            # All its calls fail together; the first one to be looked at stands for them.
            self._dismiss(member)
            self._note_end(member, error)
            return
        if call == "load":
            member.node_id = self._homes[member.number] = answer
            self._dispatcher.worker_ready(member.number)
        elif call == "outcomes":
            self._report(answer)
            if member.assignment is not None:
                member.pending[member.actor.outcomes.remote()] = "outcomes"
        else:
            self._close(member, answer)

    def _report(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            self._dispatcher.report(outcome.shard_id, [outcome])

    def _close(self, member: _Member, report: _Report) -> None:
        assert member.assignment is not None
        shard_id = member.assignment.shard.shard_id
        member.assignment = None
        self._report(report.outcomes)
        self._dispatcher.ended(shard_id, report.kind, report.fault, str(member.log))
        if report.kind == "given_back" or not self._dispatcher.is_of_use(member.number):
            self._dismiss(member)

    def _note_end(self, member: _Member, error: RayError) -> None:
        """Books a failure to start; a death over a shard is booked once it is known whether the machine went away."""
        if member.assignment is not None:
            self._fallen.append(_Fallen(member, error))
        elif member.node_id is None and _is_of_machine(error):
            # Ray may give another worker to a lost machine that it still lists as living: no haste with the next one.
            self._no_hiring_before = time.monotonic() + POLL_S
        elif member.node_id is None:
            others = self._members.values()
            others_work = any(each.node_id is not None or self._dispatcher.may_start(each.number) for each in others)
            self._dispatcher.start_failed(member.number, _short(error), str(member.log), others_work=others_work)

    def _book_fallen(self) -> None:
        """Looks once a second which nodes live, and books the deaths that are clear by then."""
        if not self._fallen or time.monotonic() - self._nodes_seen < POLL_S:
            return
        self._nodes_seen = time.monotonic()
        living = {node["NodeID"] for node in all_nodes() if node["Alive"]}
        fallen, self._fallen = self._fallen, []
        for each in fallen:
            assert each.member.assignment is not None
            shard_id, log = each.member.assignment.shard.shard_id, str(each.member.log)
            if _is_preempted(each.error) or each.member.node_id not in living:
                self._dispatcher.machine_lost(shard_id, log)
            elif each.is_dead_alone:
                self._dispatcher.died(shard_id, _short(each.error), log)
            else:
                self._fallen.append(each)

    def _warn_if_pending(self) -> None:
        if any(member.node_id is not None for member in self._members.values()):
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > PENDING_WARNING_S:
            self._waiting_since = time.monotonic()
            free = ray.available_resources()  # type: ignore[no-untyped-call] # Ray's hints leave it out
            _log.warning(
                "no worker has started in the last %.0f s; free in the cluster: %.0f CPUs, %.0f GPUs",
                PENDING_WARNING_S, free.get("CPU", 0), free.get("GPU", 0),
            )  # fmt: skip

    def _wind_up(self, request: StopRequest) -> None:
        """Lets busy workers commit, then ends the run."""
        for member in self._members.values():
            if member.assignment is not None:
                member.actor.stop.remote()
        deadline = begin_stopping()
        while self._busy() and time.monotonic() < deadline:
            self._step()
        assert request.signal_number is not None
        raise InterruptedBySignalError(request.signal_number)


def _is_preempted(error: RayError) -> bool:
    return isinstance(error, RayActorError) and error.preempted


def _is_of_machine(error: RayError) -> bool:
    """Whether a worker that was not ready yet went away with its machine, and did not fail to start."""
    return isinstance(error, ActorUnavailableError) or _is_preempted(error) or "its node has died" in str(error)


_NOT_THE_SAME = "failed to import on the worker|input arguments for this task could not be computed"


def _short(error: RayError) -> str:
    """The telling line of Ray's many, without its guesses: what an actor's start raised, or how a process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OutOfMemoryError):  # Ray killed it, and ends with advice of its own
        return lines[0][:300]
    telling = [line for line in lines if line.startswith(("The actor is dead because", "The actor died because its"))]
    line = (telling or lines[-1:] or [type(error).__name__])[0]
    if where := re.search(rf"\bip=([^,]+).*({_NOT_THE_SAME})", str(error), re.DOTALL):
        return f"{line[:200]}, on {where[1]}: every node needs the same dfpir"
    return line.partition(" Some common causes include")[0][:300]
