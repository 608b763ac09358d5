"""Drives a planned run as the command does, in a process that a test may kill: `run_driver.py ENGINE PICKLE`."""

import pickle
import sys
from pathlib import Path

from jobs.runner import Runner
from pipeline.records import Shard
from pipeline.run_config import RunContext
from pipeline.sink import RunDirectory, done


def drive(runner: Runner, context: RunContext, shards: tuple[Shard, ...]) -> list[str]:
    """Removes what was left half-written, then works off what has no row; returns the ids reported."""
    directory = RunDirectory(context.run_dir)
    directory.await_workers()
    directory.remove_partials()
    rows = done(context.run_dir)
    finished = set(zip(rows["image_id"].to_pylist(), rows["revision"].to_pylist(), strict=True))
    left = [Shard(s.shard_id, tuple(i for i in s.images if (i.image_id, i.revision) not in finished)) for s in shards]
    reported: list[str] = []
    runner.run(
        [shard for shard in left if shard.images],
        context,
        on_outcomes=lambda rows: reported.extend(row.image_id for row in rows),
    )
    return reported


def make_runner(engine: str) -> Runner:
    if engine == "local":
        from jobs.local import LocalRunner

        return LocalRunner()
    from jobs.ray_runner import RayRunner

    return RayRunner(max_workers=1)


if __name__ == "__main__":
    context, shards = pickle.loads(Path(sys.argv[2]).read_bytes())
    drive(make_runner(sys.argv[1]), context, shards)
