import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from run_driver import drive
from tiny_runs import TinyRun, check_complete, rows_of, stalled_process

from jobs import local
from jobs.dispatcher import Dispatcher
from jobs.errors import InterruptedBySignalError, RunError
from jobs.local import LocalRunner, crew_size
from pipeline.faults import FAULT, MARKER
from pipeline.run_config import RunContext

MakeRun = Callable[..., TinyRun]
NAMES = ["a.png", "b.png", "deep/c.jpg", "deep/d.png", "e.png"]


def children() -> list[int]:
    """Process ids of this process's children that are not mere helpers of multiprocessing."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"spawn_main" in command:
                found.append(int(pid))
    return found


def test_a_run_ends_with_a_row_for_each_image_and_reports_each_once(make_run: MakeRun) -> None:
    run = make_run(NAMES)
    reported = drive(LocalRunner(max_workers=2), run.context, run.shards)
    rows = check_complete(run)
    assert sorted(reported) == sorted(row["image_id"] for row in rows.values())
    assert {row["status"] for row in rows.values()} == {"restored"}
    for worker_id in {row["worker_id"] for row in rows.values()}:  # one may have done all before the other was ready
        number = worker_id.removeprefix("local-")
        assert (run.directory.logs_dir / f"worker-{number}.log").exists()
    assert children() == []


@pytest.mark.parametrize(
    ("threads", "gib", "max_workers", "shards", "expected"),
    [(2, [], None, 9, 1), (16, [80], None, 9, 5), (16, [80], None, 2, 2), (16, [80] * 4, None, 9, 8),
     (48, [80] * 4, None, 99, 20), (48, [80, 80, 80, 40], None, 99, 8), (16, [24], None, 9, 1), (1, [80], None, 9, 1),
     (16, [800], None, 9, 8), (7, [80], None, 9, 3), (16, [80], 1, 9, 1), (16, [], 3, 9, 3), (16, [80], None, 0, 1)],
)  # fmt: skip
def test_a_gpu_gets_several_workers_if_there_are_cpus_memory_and_shards_for_them(
    make_run: MakeRun, threads: int, gib: list[int], max_workers: int | None, shards: int, expected: int
) -> None:
    context = replace(make_run(NAMES).context, threads=threads, least_gpu_bytes=16 * 2**30)
    gpu_bytes = [each * 2**30 for each in gib]
    assert crew_size(context, gpu_bytes, max_workers=max_workers, shards=shards) == expected


def test_workers_end_together_and_not_one_after_the_other(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, open_at_join, made = make_run(NAMES), [], []

    class Observed(local._Child):
        def __init__(self, number: int, context: RunContext, *, gpu: int | None) -> None:
            super().__init__(number, context, gpu=gpu)
            made.append(self)

        def join(self) -> None:
            open_at_join.append(sum(not child.connection.closed for child in made))
            super().join()

    monkeypatch.setattr(local, "_Child", Observed)
    drive(LocalRunner(max_workers=2), run.context, run.shards)
    assert open_at_join == [0, 0]
    check_complete(run)


def test_workers_divide_the_machine_among_them(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(NAMES)
    seen = []

    class Observed(local._Child):
        def __init__(self, number: int, context: RunContext, *, gpu: int | None) -> None:
            seen.append((context.threads, context.sharers))
            super().__init__(number, context, gpu=gpu)

    monkeypatch.setattr(local, "_Child", Observed)
    drive(LocalRunner(max_workers=2), replace(run.context, threads=5), run.shards)
    assert seen == [(2, 2), (2, 2)]
    check_complete(run)


def test_a_run_that_is_done_does_nothing(make_run: MakeRun) -> None:
    run = make_run(NAMES)
    drive(LocalRunner(), run.context, run.shards)
    before = {path: path.stat().st_mtime_ns for path in run.directory.root.rglob("*.p*") if path.is_file()}
    assert drive(LocalRunner(), run.context, run.shards) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_image_that_kills_its_process_is_quarantined_and_its_mates_are_done(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(["a.png", "b.png", "poison.png", "z.png"], per_shard=4)
    monkeypatch.setenv(FAULT, "kill:decode:poison.png")
    reported = drive(LocalRunner(), run.context, run.shards)
    rows = check_complete(run)
    assert len(reported) == 4
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.png": "restored", "b.png": "restored", "poison.png": "quarantined", "z.png": "restored",
    }  # fmt: skip
    poison = rows["poison.png"]
    assert (poison["stage"], poison["error_class"]) == ("process", "process_died")
    assert "died 2 times" in poison["error_message"]
    assert list(run.directory.journal_dir.glob("*.json")) == []


@pytest.mark.slow
def test_an_image_over_which_its_worker_hangs_is_quarantined_and_its_mates_are_done(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run(["a.png", "hangs.png", "z.png"])
    monkeypatch.setenv(FAULT, "stall:decode:hangs.png")
    monkeypatch.setenv(MARKER, str(tmp_path / "marker"))
    drive(LocalRunner(), replace(run.context, patience_s=6.0), run.shards)
    rows = check_complete(run)
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.png": "restored", "hangs.png": "quarantined", "z.png": "restored",
    }  # fmt: skip
    log = (run.directory.logs_dir / "worker-0.log").read_text()
    assert "Timeout (0:00:06)" in log
    assert "in fault_point" in log


@pytest.mark.parametrize("fault", ["of the pipe", "of the driver"])
def test_a_broken_pipe_is_the_childs_end_and_a_fault_of_the_driver_is_its_own(fault: str) -> None:
    """Such as a manifest that cannot be read."""
    child: Any = Mock()
    child.connection.closed, child.assignment = False, None
    dispatcher = Mock()
    if fault == "of the pipe":
        child.connection.recv.side_effect = OSError("got end of file during message")
        local._drain(child, {}, dispatcher)
        child.process.join.assert_called_once()
    else:
        child.connection.recv.return_value = local._Message("outcomes")
        dispatcher.report.side_effect = OSError("of the driver")
        with pytest.raises(OSError, match="of the driver"):
            local._drain(child, {}, dispatcher)


def test_a_killed_worker_is_replaced_and_the_run_goes_on(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run(NAMES)
    marker = tmp_path / "marker"
    monkeypatch.setenv(FAULT, "stall:decode:deep/d.png")
    monkeypatch.setenv(MARKER, str(marker))

    def kill() -> None:
        pid = stalled_process(marker)
        monkeypatch.delenv(FAULT)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    drive(LocalRunner(), run.context, run.shards)
    killer.join()
    assert {row["status"] for row in check_complete(run).values()} == {"restored"}


def test_workers_that_die_at_the_start_end_the_run_with_their_log(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(NAMES)
    monkeypatch.setenv(FAULT, "kill:start:local-0")
    with pytest.raises(RunError, match=r"3 workers in a row.*SIGKILL.*worker-0\.log"):
        drive(LocalRunner(), run.context, run.shards)
    assert rows_of(run) == {}


def test_a_worker_that_cannot_start_leaves_the_work_to_the_others(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([f"{number:02}.png" for number in range(12)], per_shard=2)
    monkeypatch.setenv(FAULT, "raise:start:local-1")
    drive(LocalRunner(max_workers=2), run.context, run.shards)
    rows = check_complete(run)
    assert {row["status"] for row in rows.values()} == {"restored"}
    assert {row["worker_id"] for row in rows.values()} == {"local-0"}
    assert {row["attempt"] for row in rows.values()} == {1}


def test_other_weights_than_the_run_was_started_with_are_refused_in_words(make_run: MakeRun) -> None:
    run = make_run(NAMES, weights_sha256="f" * 64)
    with pytest.raises(RunError, match="the run was started with ffff"):
        drive(LocalRunner(), run.context, run.shards)
    assert "the run was started with ffff" in (run.directory.logs_dir / "worker-0.log").read_text()


def test_sigterm_has_workers_commit_and_the_run_can_go_on(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number:02}.png" for number in range(40)]
    run = make_run(names, per_shard=40)
    seen: list[str] = []

    def end_at_first(rows: list[object]) -> None:
        if not seen:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.extend(str(row) for row in rows)

    with pytest.raises(InterruptedBySignalError) as ended:
        LocalRunner().run(run.shards, run.context, on_outcomes=end_at_first)
    assert ended.value.signal_number == signal.SIGTERM
    assert len(rows_of(run)) == len(seen) > 0
    assert children() == []
    drive(LocalRunner(), run.context, run.shards)
    assert len(check_complete(run)) == 40


def test_the_local_runner_leaves_ray_alone() -> None:
    code = "import sys, jobs.local, pipeline.worker; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_worker_that_gives_its_shard_back_gets_no_other_and_its_end_is_no_death(make_run: MakeRun) -> None:
    run = make_run(NAMES)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)
    ended = SimpleNamespace(exitcode=0, sentinel=-1, join=lambda timeout=None: None)
    child: Any = SimpleNamespace(
        number=0,
        log="log",
        is_ready=True,
        has_failed=False,
        hangs=False,
        assignment=dispatcher.take(0, {0: "here"}),
        process=ended,
    )
    local._act(child, local._Message("given_back"), dispatcher, others_work=False)
    assert child.assignment is None
    assert not child.is_ready
    local._note_end(child, dispatcher, others_work=False)
    assignment = dispatcher.take(0, {0: "here"})
    assert assignment is not None
    assert (assignment.shard.shard_id, assignment.attempt) == ("s000", 1)


def test_workers_that_hang_while_they_load_end_the_run(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run(NAMES)
    monkeypatch.setenv(FAULT, "stall:start")
    monkeypatch.setenv(MARKER, str(tmp_path / "marker"))
    monkeypatch.setattr(local, "START_PATIENCE_S", 0.5)
    with pytest.raises(RunError, match="3 workers in a row ended before they could take an image"):
        drive(LocalRunner(), run.context, run.shards)
    assert children() == []


def test_a_log_that_cannot_be_written_is_told_in_words(make_run: MakeRun) -> None:
    run = make_run(NAMES)
    log = run.directory.logs_dir / "worker-0.log"
    log.mkdir(parents=True)
    with pytest.raises(RunError, match=f"Is a directory: {log}"):
        LocalRunner(max_workers=1).run(run.shards, run.context, on_outcomes=lambda rows: None)
