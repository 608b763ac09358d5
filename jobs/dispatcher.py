"""Which shard goes where next, and what a worker's death means; knows nothing of processes."""

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jobs.errors import RunError
from pipeline.journal import Journal
from pipeline.records import OnOutcomes, Outcome, Shard, Status
from pipeline.run_config import RunContext
from pipeline.sink import RunDirectory

FAILURES_ALLOWED = 3
"""Of one worker in a row: ends before it is ready, shards that it could not go on with, deaths over shards."""

FRUITLESS_DEATHS_ALLOWED = 3
"""Deaths in a row over one shard that point at no image and between which no image got done."""

FRUITLESS_QUARANTINES_ALLOWED = 8
"""Images set aside while no other got done: it is rather the machine or the program that makes workers die then.

So that this is known soon, shards go first after as many deaths without an image done."""

LOSSES_FORGIVEN = 4
"""Machines lost in a row over one shard without an image done in between; further ones count as deaths."""

_log = logging.getLogger(__name__)

Ending = Literal["done", "given_back", "doubted", "busy", "failed"]
"""What a worker that lives says of its shard: see the methods of `Dispatcher`."""

Seat = tuple[int, str | None]
"""A worker's number and its machine; None while that is not known."""


@dataclass(frozen=True)
class Assignment:
    """A shard given to a worker."""

    shard: Shard
    attempt: int
    """From 1; deaths raise it, and machines lost over the shard after the first; the second is a careful one."""
    seat: Seat
    """The worker that has it."""
    doubted_by: Seat | None = None
    """The worker on which images failed, perhaps for its machine's sake; the next word is final."""
    died_with: Seat | None = None
    """The worker that died over it last, perhaps for its machine's sake."""


class Dispatcher:
    """The queue of shards and the bookkeeping of deaths.

    A death costs the shard an attempt, a careful one from the second on (see `pipeline.journal`). It ends
    the run when workers cannot even start, or when a shard kills its workers without one image being to blame.
    So attempts are bounded: an image is given up after two deaths, and any other death must follow headway. So must
    the loss of a machine, after a few of them: an image can take its machine with it.
    What a worker doubted or died over goes to another one, so that an image is given up on the word of two. A worker
    that fails shard after shard (its machine does not see the photographs, or every process there dies) gets no more.
    The last one left may die as often as its shards have it.
    """

    def __init__(
        self, shards: Sequence[Shard], context: RunContext, on_outcomes: OnOutcomes, *, workers: int = 1
    ) -> None:
        """`workers`: how many there may be, numbered from 0."""
        self.workers = workers
        self._directory = RunDirectory(context.run_dir)
        self._on_outcomes = on_outcomes
        self._shards = shards
        self._given_out = 0
        self._first, self._last = deque[Assignment](), deque[Assignment]()
        """Assignments that came back, to go out before and after those that were never out."""
        self._assigned: dict[str, Assignment] = {}
        self._reported: dict[str, set[str]] = {}
        """Ids of the images that are done, by shard; of shards that are not done."""
        self._done: set[str] = set()
        self._has_headway: set[str] = set()
        """Shards of which an image got done since they were given out."""
        self._quarantined, self._is_fruitful, self._died = 0, False, 0
        self._failures: Counter[int] = Counter()
        """In a row, by the worker's number: before it was ready, or over a shard that it outlived."""
        self._deaths: Counter[int] = Counter()
        """Over shards, by the worker's number, since it last got an image done."""
        self._proven: set[int] = set()
        """Workers that got an image done."""
        self._retired: set[int] = set()
        self._told: set[int] = set()
        """Workers of which has been told that they get no more."""
        self._fruitless: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        """Machines, by shard."""
        self._directory.create()
        for path in self._directory.journal_dir.glob("*.json"):
            # Left by a run whose driver was ended: its workers died with it, whatever they had in hand.
            Journal(self._directory.journal_dir, path.stem).forgive()

    @property
    def is_finished(self) -> bool:
        """Whether every shard is done."""
        return not self.unassigned and not self._assigned

    @property
    def unassigned(self) -> int:
        """Shards that wait for a worker."""
        return len(self._first) + len(self._shards) - self._given_out + len(self._last)

    def take(self, number: int, crew: Mapping[int, str | None]) -> Assignment | None:
        """The next shard for the worker of this number, which is ready, or None.

        `crew`: the machines of all workers that are ready or soon will be, by number; None where it is not known yet.
        What one of them doubted or died over is for another one, on another machine where there is one.
        """
        seat = (number, crew[number])
        assignment = _taken(self._first, number, crew)
        if assignment is None and self._given_out < len(self._shards):
            assignment = Assignment(self._shards[self._given_out], 1, seat)
            self._given_out += 1
        assignment = assignment or _taken(self._last, number, crew)
        if assignment is None:
            return None
        assignment = self._assigned[assignment.shard.shard_id] = replace(assignment, seat=seat)
        self._has_headway.discard(assignment.shard.shard_id)
        return assignment

    def worker_ready(self, number: int) -> None:
        """A worker has loaded its weights."""
        del self._failures[number]

    def report(self, shard_id: str, outcomes: list[Outcome]) -> None:
        """Passes on images as they get done; those done again after a death are passed on once.

        Raises RunError when one image after the other is set aside and none gets done.
        """
        if shard_id in self._done:
            return  # on their way while the shard's end was told, which has reported them
        reported = self._reported.setdefault(shard_id, set())
        fresh = [outcome for outcome in outcomes if outcome.image_id not in reported]
        if fresh:
            del self._fruitless[shard_id], self._losses[shard_id]
            reported.update(outcome.image_id for outcome in fresh)
            self._on_outcomes(fresh)
            set_aside = sum(outcome.status is Status.QUARANTINED for outcome in fresh)
            self._quarantined += set_aside
            if set_aside < len(fresh):
                self._is_fruitful = True
            if any(outcome.status not in (Status.QUARANTINED, Status.FAILED) for outcome in fresh):
                self._has_headway.add(shard_id)
                if shard_id in self._assigned:
                    self._proven.add(self._assigned[shard_id].seat[0])
            if self._quarantined >= FRUITLESS_QUARANTINES_ALLOWED and not self._is_fruitful:
                raise _broken_off(
                    f"workers died over each of {self._quarantined} images, and none got done: it is rather the "
                    "machine's fault than theirs (--retry-failed does them again)",
                    str(self._directory.logs_dir),
                )

    def ended(self, shard_id: str, how: Ending, fault: str, log: str) -> None:
        """The shard's worker is through with it."""
        match how:
            case "done":
                self.done(shard_id)
            case "given_back":
                self.give_back(shard_id)
            case "doubted":
                self.doubted(shard_id)
            case "busy":
                self.busy(shard_id, fault, log)
            case "failed":
                self.failed(shard_id, fault, log)

    def done(self, shard_id: str) -> None:
        """The shard's worker has committed a row for each image of it."""
        assignment = self._assigned.pop(shard_id)
        number = assignment.seat[0]
        del self._failures[number], self._deaths[number]
        shard = assignment.shard
        if any(ref.image_id not in self._reported.get(shard_id, ()) for ref in shard.images):
            # Committed by a worker that died before it could tell.
            planned = {(ref.image_id, ref.revision) for ref in shard.images}
            rows = self._directory.rows(shard_id)
            self.report(shard_id, [row for row in rows if (row.image_id, row.revision) in planned])
        self._reported.pop(shard_id, None)
        self._done.add(shard_id)
        doubter = assignment.doubted_by[0] if assignment.doubted_by is not None else None
        if doubter not in (None, number) and shard_id in self._has_headway:
            self._note_failure(doubter, "images that others could read or restore", f"its log, worker-{doubter}.log")
        self._has_headway.discard(shard_id)

    def give_back(self, shard_id: str) -> None:
        """The shard's worker ended before its end through no fault of an image: same attempt, elsewhere."""
        assignment = self._assigned.pop(shard_id)
        Journal(self._directory.journal_dir, shard_id).forgive()
        self._first.appendleft(assignment)

    def doubted(self, shard_id: str) -> None:
        """Images of the shard failed on the worker that has it, which may be its machine's fault."""
        assignment = self._assigned.pop(shard_id)
        self._last.append(replace(assignment, doubted_by=assignment.seat))

    def busy(self, shard_id: str, fault: str, log: str) -> None:
        """Another process holds the shard, such as one of a machine that hangs: not the fault of who was given it.

        Raises RunError when that process has held it through several attempts.
        """
        self._retry(shard_id, fault, log, is_fruitless=True, is_death=False)

    def machine_lost(self, shard_id: str, log: str) -> None:
        """The shard's worker went away with its machine: no image's fault, as far as one such loss can tell.

        The next time the shard goes out last, with care, so that it holds up no other and one image is in hand.
        """
        number = self._assigned[shard_id].seat[0]
        _log.warning("the machine of worker %d was lost, over shard %s: see %s", number, shard_id, log)
        self._losses[shard_id] += 1
        if self._losses[shard_id] == 1:
            self.give_back(shard_id)
        elif self._losses[shard_id] <= LOSSES_FORGIVEN:
            Journal(self._directory.journal_dir, shard_id).forgive()
            self._retry(shard_id, "its machine was lost", log, is_fruitless=False)
        else:
            self.died(shard_id, f"{self._losses[shard_id]} machines were lost over it in a row", log)

    def failed(self, shard_id: str, fault: str, log: str) -> None:
        """The shard's worker lives, but could not go on with it (a full disk, for instance).

        Where others are of use, it is taken for the worker's fault and not for the shard's. Raises RunError when no
        worker is of use any more; `is_of_use` says whether this one is.
        """
        number = self._assigned[shard_id].seat[0]
        self._note_failure(number, fault, log)
        others = any(self.is_of_use(each) for each in range(self.workers) if each != number)
        fault = f"the worker failed over it ({fault})"
        self._retry(shard_id, fault, log, is_fruitless=not others, is_death=False)
        self._require_one_of_use(fault, log)

    def died(self, shard_id: str, fault: str, log: str) -> None:
        """The process of the shard's worker ended while it had the shard."""
        assignment = self._assigned[shard_id]
        number = assignment.seat[0]
        self._died += 1
        _log.warning("worker %d died over shard %s (%s): see %s", number, shard_id, fault, log)
        if shard_id in self._has_headway:
            del self._deaths[number]  # a worker that gets images done is not what is at fault
        else:
            self._note_death(number, fault, log)
        journal = Journal(self._directory.journal_dir, shard_id)
        self._assigned[shard_id] = replace(assignment, died_with=assignment.seat)
        names_image = journal.has_in_flight
        is_urgent = (
            self._died >= FRUITLESS_QUARANTINES_ALLOWED
            and not self._is_fruitful
            and (names_image or assignment.attempt == 1)  # an image is on its way to be set aside
        )
        fault = f"its worker died ({fault})"
        self._retry(shard_id, fault, log, is_fruitless=not names_image, is_urgent=is_urgent)

    def start_failed(self, number: int, fault: str, log: str, *, others_work: bool) -> None:
        """The worker of this number ended before it was ready.

        Raises RunError when that happens again and again and no other worker is ready or may yet be (`others_work`), or
        has got an image done and is of use; otherwise `is_of_use` says when it is no longer worth trying.
        """
        others_work = others_work or any(self.is_of_use(each) for each in self._proven - {number})
        self._note_failure(number, fault, log)
        if self._failures[number] == 1:
            _log.warning("worker %d ended before it was ready (%s): see %s", number, fault, log)
        failures = sum(count for each, count in self._failures.items() if each == number or self.is_of_use(each))
        if failures >= FAILURES_ALLOWED and not others_work:
            raise _broken_off(f"{failures} workers in a row ended before they could take an image ({fault})", log)
        self._require_one_of_use(fault, log)

    def may_start(self, number: int) -> bool:
        """Whether the worker of this number, which loads its weights, has not failed to do so before."""
        return not self._failures[number]

    def is_of_use(self, number: int) -> bool:
        """Whether a worker of this number may be started, or get another shard."""
        return self._failures[number] < FAILURES_ALLOWED and number not in self._retired

    def _require_one_of_use(self, fault: str, log: str) -> None:
        if not any(map(self.is_of_use, range(self.workers))):
            raise _broken_off(f"every worker failed {FAILURES_ALLOWED} times in a row, at last so: {fault}", log)

    def _note_failure(self, number: int, fault: str, log: str) -> None:
        self._failures[number] += 1
        self._tell_if_useless(number, fault, log)

    def _note_death(self, number: int, fault: str, log: str) -> None:
        """Retires a worker that dies over shard after shard while another one gets images done and does not."""
        self._deaths[number] += 1
        others = (each for each in self._proven if each != number and self.is_of_use(each))
        if self._deaths[number] >= FAILURES_ALLOWED and any(not self._deaths[each] for each in others):
            self._retired.add(number)
        self._tell_if_useless(number, fault, log)

    def _tell_if_useless(self, number: int, fault: str, log: str) -> None:
        if not self.is_of_use(number) and number not in self._told:
            self._told.add(number)
            _log.warning("worker %d failed %d times in a row (%s) and gets no more: see %s",
                         number, FAILURES_ALLOWED, fault, log)  # fmt: skip

    def _retry(
        self, shard_id: str, fault: str, log: str, *, is_fruitless: bool, is_death: bool = True, is_urgent: bool = False
    ) -> None:
        assignment = self._assigned.pop(shard_id)
        if is_fruitless:
            self._fruitless[shard_id] += 1
        if self._fruitless[shard_id] >= FRUITLESS_DEATHS_ALLOWED:
            raise _broken_off(
                f"shard {shard_id} made no headway in {self._fruitless[shard_id]} attempts in a row: {fault}", log
            )
        queue = self._first if is_urgent else self._last
        queue.append(replace(assignment, attempt=assignment.attempt + is_death))


def _taken(queue: deque[Assignment], number: int, crew: Mapping[int, str | None]) -> Assignment | None:
    """The first of a queue, taken out of it, that no other of the crew is better placed to take."""
    for place, assignment in enumerate(queue):
        own = _bias(number, crew[number], assignment)
        if not any(_bias(each, machine, assignment) < own for each, machine in crew.items()):
            del queue[place]
            return assignment
    return None


def _bias(number: int, machine: str | None, assignment: Assignment) -> tuple[int, int]:
    """How near a worker is to the one that doubted a shard, then to the one that died over it: 2 is it, 1 beside it.

    Doubts come first: who doubts again would be taken at its word.
    """

    def nearness(seat: Seat | None) -> int:
        if seat is None:
            return 0
        return 2 if seat[0] == number else int(machine is not None and seat[1] == machine)

    return nearness(assignment.doubted_by), nearness(assignment.died_with)


def _broken_off(what: str, log: str) -> RunError:
    return RunError(f"{what}. See {log}; when the cause is removed, the same command goes on from here.")
