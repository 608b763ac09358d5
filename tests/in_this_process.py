"""Runs without child processes, which take seconds to start: the real dispatcher and worker, in the test's process."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from jobs.dispatcher import Dispatcher
from jobs.runner import work_off
from pipeline.records import OnOutcomes, Outcome, Shard
from pipeline.run_config import RunContext
from pipeline.worker import build_worker


class Killed(BaseException):
    """As by SIGKILL: what is not committed is lost."""


class InThisProcess:
    """A runner whose only worker goes on to the end, or is stopped or killed once so many images are done."""

    def __init__(self, *, most: int | None = None, kills: bool = False) -> None:
        self.most, self.kills = most, kills

    def run(self, shards: Sequence[Shard], context: RunContext, *, on_outcomes: OnOutcomes) -> None:
        dispatcher = Dispatcher(shards, context, on_outcomes)
        worker = build_worker(replace(context, threads=1), "here")
        done = 0

        def note(shard_id: str, rows: list[Outcome]) -> None:
            nonlocal done
            done += len(rows)
            dispatcher.report(shard_id, rows)
            if self.most is not None and done >= self.most:
                if self.kills:
                    raise Killed
                worker.stop()

        while not worker.is_stopping and (assignment := dispatcher.take(0, {0: "here"})) is not None:
            shard_id = assignment.shard.shard_id
            how, fault = work_off(worker, assignment, partial(note, shard_id))
            dispatcher.ended(shard_id, how, fault, "its log")
        if worker.is_stopping:
            raise Killed
