"""The dispatcher in drawn worlds: whatever one bad machine does, a run ends, with one right row for each image."""

import random
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import config_of, outcome_of

from jobs.dispatcher import Assignment, Dispatcher
from pipeline.journal import Journal
from pipeline.records import ImageRef, Outcome, Shard, Status
from pipeline.run_config import RunContext
from pipeline.sink import RunDirectory

MAY_BE = {
    "good": {Status.RESTORED},
    "bad": {Status.FAILED, Status.QUARANTINED},  # the latter where it was with a machine on which every process dies
    "poison": {Status.QUARANTINED},
}
MOST_STEPS = 5000


@dataclass
class Worker:
    number: int
    machine: int
    nature: str
    is_up: bool = False
    is_ready: bool = False
    assignment: Assignment | None = None
    going: Generator[None, None, str] | None = None


class World:
    """Workers on machines, of which number 0 may be bad, and images that are good, bad or deadly."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.committed: dict[str, Status] = {}
        self.told: list[Outcome] = []
        bad = self.rng.choice(["blind", "does not start", "dies", "full disk", "good"])
        self.deadly = 0.5 if bad != "dies" else 0
        machines = [0, 1, *self.rng.choices([0, 1, 2], k=self.rng.randint(0, 2))]
        self.workers = [Worker(n, machine, "good" if machine else bad) for n, machine in enumerate(machines)]
        self.shards = [
            Shard(f"s{shard}", tuple(self.image(f"{shard}-{place}") for place in range(self.rng.randint(1, 5))))
            for shard in range(self.rng.randint(1, 6))
        ]
        self.directory = RunDirectory(folder)
        context = RunContext(
            run_id="run", run_dir=str(folder), source_root="", config=config_of(), code_version="1", device="cpu",
            threads=1, least_gpu_bytes=0,
        )  # fmt: skip
        self.dispatcher = Dispatcher(self.shards, context, self.told.extend, workers=len(self.workers))

    def image(self, name: str) -> ImageRef:
        nature = self.rng.choices(list(MAY_BE), weights=[10, 1, self.deadly])[0]
        return ImageRef(f"{name}-{nature}", nature, "", 0, None)

    def run(self) -> None:
        steps = 0
        while not self.dispatcher.is_finished:
            steps += 1
            assert steps < MOST_STEPS, "no worker takes what is left"
            for worker in self.workers:
                worker.is_up |= self.dispatcher.is_of_use(worker.number)
                if not self.dispatcher.is_of_use(worker.number) and worker.assignment is None:
                    worker.is_up = worker.is_ready = False
            for worker in self.workers:
                if worker.is_ready and worker.assignment is None:
                    self.give(worker)
            self.step(self.rng.choice(self.workers))

    def give(self, worker: Worker) -> None:
        """As the Ray runner does."""
        crew = {
            each.number: str(each.machine) if each.is_ready else None
            for each in self.workers
            if each.is_ready or (each.is_up and self.dispatcher.may_start(each.number))
        }
        worker.assignment = self.dispatcher.take(worker.number, crew)
        if worker.assignment is not None:
            worker.going = self.work(worker, worker.assignment)

    def step(self, worker: Worker) -> None:
        """One worker gets one image further, or one word to the dispatcher."""
        number = worker.number
        if worker.is_up and not worker.is_ready:
            if worker.nature == "does not start":
                worker.is_up = False
                others = [each for each in self.workers if each is not worker and each.is_up]
                others_work = any(each.is_ready or self.dispatcher.may_start(each.number) for each in others)
                self.dispatcher.start_failed(number, "no weights", "log", others_work=others_work)
            else:
                worker.is_ready = True
                self.dispatcher.worker_ready(number)
        elif worker.going is not None and worker.assignment is not None:
            try:
                next(worker.going)
            except StopIteration as end:
                shard_id = worker.assignment.shard.shard_id
                worker.assignment = worker.going = None
                if end.value == "died":
                    worker.is_up = worker.is_ready = False
                    self.dispatcher.died(shard_id, "SIGKILL", "log")
                elif end.value == "failed":
                    self.dispatcher.failed(shard_id, "full disk", "log")
                elif end.value == "doubted":
                    self.dispatcher.doubted(shard_id)
                else:
                    self.dispatcher.done(shard_id)

    def work(self, worker: Worker, assignment: Assignment) -> Generator[None, None, str]:
        """What `pipeline.worker.Worker` does with a shard, without pixels; returns how it ended."""
        if worker.nature == "full disk":
            return "failed"
        shard = assignment.shard
        journal = Journal(self.directory.journal_dir, shard.shard_id)
        is_careful = assignment.attempt > 1 or not journal.is_empty
        if is_careful:
            journal.count_death()
        rows: dict[str, Status] = {}
        is_certain = True
        todo = [ref for ref in shard.images if ref.image_id not in self.committed]
        poison = [ref for ref in todo if is_careful and journal.is_poison(ref.image_id)]
        for ref in sorted((ref for ref in todo if ref not in poison), key=lambda ref: journal.deaths(ref.image_id)):
            if is_careful:
                if journal.deaths(ref.image_id):
                    self.commit(rows)
                journal.begin(ref.image_id)
            yield
            if worker.nature == "dies" or ref.relative_path == "poison":
                return "died"
            if is_careful:
                journal.end()
            is_readable = worker.nature != "blind" and ref.relative_path == "good"
            status = Status.RESTORED if is_readable else Status.FAILED
            if status is Status.FAILED and assignment.doubted_by is None:
                is_certain = False
                continue
            rows[ref.image_id] = status
            self.dispatcher.report(shard.shard_id, [outcome_of(ref, shard.shard_id, status)])
        self.commit(rows | {ref.image_id: Status.QUARANTINED for ref in poison})
        self.dispatcher.report(shard.shard_id, [outcome_of(ref, shard.shard_id, Status.QUARANTINED) for ref in poison])
        if not is_certain:
            return "doubted"
        journal.remove()
        return "done"

    def commit(self, rows: dict[str, Status]) -> None:
        assert not rows.keys() & self.committed.keys(), "a second row"
        self.committed.update(rows)
        rows.clear()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_one_bad_machine_costs_no_image_its_row(tmp_path_factory, seed: int) -> None:
    world = World(seed, tmp_path_factory.mktemp("run"))
    world.run()
    images = [ref for shard in world.shards for ref in shard.images]
    assert world.committed.keys() == {ref.image_id for ref in images}
    assert all(world.committed[ref.image_id] in MAY_BE[ref.relative_path] for ref in images)
    assert sorted(row.image_id for row in world.told) == sorted(ref.image_id for ref in images)
