import errno
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import ray
from PIL import Image
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError
from run_driver import drive
from synthetic_classifier import write_tiny_classifier
from synthetic_weights import write_tiny_model
from tiny_runs import TinyRun, check_complete, lasting, rows_of, stalled_process, write_pictures

from jobs import ray_cluster as ray_cluster_module
from jobs import ray_runner
from jobs.audit import audit
from jobs.config import RestoreOptions
from jobs.dispatcher import Assignment, Dispatcher
from jobs.errors import InterruptedBySignalError, RunError, UsageError
from jobs.local import LocalRunner
from jobs.networks import resolve_run_device
from jobs.ray_cluster import Needs, connected, measure_room
from jobs.ray_runner import RayRunner
from jobs.signals import signals_raise
from pipeline.faults import FAULT, MARKER
from pipeline.records import Shard
from pipeline.sink import ShardBusyError, read_rows

MakeRun = Callable[..., TinyRun]
NAMES = ["a.png", "b.png", "deep/c.jpg", "deep/d.png", "e.png"]


def node(cpus: int, gpus: int = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "NodeID": f"{cpus}-{gpus}", "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


def test_room_is_counted_node_by_node() -> None:
    assert measure_room([node(4), node(3), node(1)], device="cpu", threads=2) == (Needs(cpus=2, sharers=2), 3)
    assert measure_room([node(16, 4), node(8)], device="cuda", threads=16) == (Needs(cpus=4, on_gpu=True), 4)


def test_a_shard_that_another_process_holds_is_reported_as_busy_and_not_as_a_failure() -> None:
    def held(*_: object, **__: object) -> None:
        raise ShardBusyError("shard s000 is still held by another process")

    actor = object.__new__(ray_runner.WorkerActor)
    vars(actor).update(_worker=held, _outcomes=queue.SimpleQueue())
    report = actor.work(Assignment(Shard("s000", ()), 1, (0, "here")))
    assert (report.kind, report.outcomes) == ("busy", [])
    assert "still held by another process" in report.fault


@pytest.mark.parametrize(
    ("nodes", "gib", "wanted", "expected", "gpus"),
    [
        ([node(16, 1)], 160, 99, (Needs(cpus=2, on_gpu=True, sharers=8), 8), 0.125),
        ([node(16, 1)], 64, 99, (Needs(cpus=4, on_gpu=True, sharers=4), 4), 0.25),
        ([node(64, 2), node(16)], 64, 99, (Needs(cpus=8, on_gpu=True, sharers=4), 8), 0.25),
        ([node(16, 4), node(5, 1)], 80, None, (Needs(cpus=2, on_gpu=True, sharers=2), 10), 0.5),
        ([node(3, 1)], 80, 99, (Needs(cpus=3, on_gpu=True), 1), 1.0),
        ([node(16, 1)], 40, 99, (Needs(cpus=8, on_gpu=True, sharers=2), 2), 0.5),
        ([node(16, 1)], 0, 99, (Needs(cpus=16, on_gpu=True), 1), 1.0),
        ([node(64, 4)], 80, 4, (Needs(cpus=16, on_gpu=True), 4), 1.0),
        ([node(64, 4)], 80, 5, (Needs(cpus=8, on_gpu=True, sharers=2), 8), 0.5),
        ([node(0, 1), node(64, 4)], 80, 99, (Needs(cpus=3, on_gpu=True, sharers=5), 20), 0.2),
        ([node(0, 1), node(64, 4)], 80, 5, (Needs(cpus=8, on_gpu=True, sharers=2), 8), 0.5),
        ([node(1, 2)], 80, 99, (Needs(cpus=1, on_gpu=True), 1), 1.0),
    ],
)
def test_workers_share_a_gpu_that_has_cpus_and_memory_for_several_if_there_are_more_than_gpus(
    nodes: list[Any], gib: int, wanted: int | None, expected: tuple[Needs, int], gpus: float
) -> None:
    found = measure_room(nodes, device="cuda", threads=16, gpu_bytes=gib * 2**30, least_bytes=16 * 2**30, wanted=wanted)
    assert found == expected
    assert found[0].gpus == gpus


def test_workers_on_one_node_share_its_memory() -> None:
    nodes = [node(16), node(4)]
    assert measure_room(nodes, device="cpu", threads=4) == (Needs(cpus=4, sharers=4), 5)
    assert measure_room(nodes, device="cpu", threads=4, wanted=2) == (Needs(cpus=4, sharers=2), 5)
    assert measure_room(nodes, device="cpu", threads=16) == (Needs(cpus=16), 1)


def test_a_cluster_without_a_gpu_that_answers_tells_of_no_memory(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster_module, "GPU_ANSWER_WITHIN_S", 2.0)
    assert ray_cluster_module.gpu_bytes() == 0


@pytest.mark.parametrize(
    ("nodes", "device", "missing"),
    [
        ([node(1), node(1)], "cpu", "needs 2 CPUs on one node.*1 CPUs and 0 GPUs, 1 CPUs and 0 GPUs"),
        ([node(0, 1)], "cuda", "needs 1 CPU and 1 GPU on one node.*0 CPUs and 1 GPUs"),
        ([node(8)], "cuda", "needs 2 CPUs and 1 GPU on one node.*8 CPUs and 0 GPUs"),
        ([node(8, alive=False)], "cpu", "has: no node"),
    ],
)
def test_what_the_cluster_lacks_is_said_before_the_start(nodes: list[Any], device: str, missing: str) -> None:
    with pytest.raises(UsageError, match=missing):
        measure_room(nodes, device=device, threads=2)


def test_a_cluster_that_is_too_small_is_refused(ray_cluster: str, make_run: MakeRun) -> None:
    run = make_run(NAMES)
    object.__setattr__(run.context, "threads", 64)
    with pytest.raises(UsageError, match=r"needs 64 CPUs on one node.*--engine local"):
        drive(RayRunner(), run.context, run.shards)


def check_same(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Rows of one image in two runs: equal but for timings and for rounding, which may move a pixel by a level."""
    figures = ("confidence", "margin", "clean_probability_before", "clean_probability_after", "change_rmse_255")
    ours, theirs = lasting(row), lasting(expected)
    for each in (ours, theirs):
        del each["output_sha256"], each["output_bytes"]
    assert ours.pop("probabilities") == pytest.approx(theirs.pop("probabilities"), abs=1e-4)
    assert [ours.pop(name) for name in figures] == pytest.approx([theirs.pop(name) for name in figures], abs=1e-2)
    assert ours == theirs


@pytest.mark.slow
def test_ray_and_local_give_the_same_rows_and_pixels(ray_cluster: str, make_run: MakeRun) -> None:
    ours, theirs = (make_run(NAMES, out=out, per_shard=2, label="auto") for out in ("local", "ray"))
    (ours.source / "deep" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    ours, theirs = (make_run(NAMES, out=out, per_shard=2, label="auto") for out in ("local", "ray"))
    drive(LocalRunner(), ours.context, ours.shards)
    reported = drive(RayRunner(), theirs.context, theirs.shards)
    expected, rows = check_complete(ours), check_complete(theirs)
    assert sorted(reported) == sorted(row["image_id"] for row in rows.values())
    assert rows["deep/cut.png"]["status"] == "failed"
    assert {row["worker_id"][:4] for row in rows.values()} == {"ray-"}
    assert len(rows) == 6
    for name, row in rows.items():
        check_same(row, expected[name])
        if row["output_uri"] is None:
            continue
        pixels, reference = (
            np.asarray(Image.open(run.directory.root / row["output_uri"])).astype(int) for run in (theirs, ours)
        )
        assert np.abs(pixels - reference).max() <= 1


def test_an_image_that_kills_its_process_is_quarantined_and_its_mates_are_done(
    ray_cluster: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(["a.png", "b.png", "poison.png", "z.png"], per_shard=4)
    monkeypatch.setenv(FAULT, "kill:decode:poison.png")
    reported = drive(RayRunner(max_workers=1), run.context, run.shards)
    rows = check_complete(run)
    assert len(reported) == 4
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.png": "restored", "b.png": "restored", "poison.png": "quarantined", "z.png": "restored",
    }  # fmt: skip


def test_a_killed_worker_is_replaced_and_the_run_goes_on(
    ray_cluster: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
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
    reported = drive(RayRunner(max_workers=1), run.context, run.shards)
    killer.join()
    assert len(reported) == len(set(reported)) == len(NAMES)
    assert {row["status"] for row in check_complete(run).values()} == {"restored"}


def actor_processes() -> list[int]:
    """Process ids of the worker actors on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::WorkerActor"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_worker_that_gets_sigterm_commits_and_costs_no_attempt(ray_cluster: str, make_run: MakeRun) -> None:
    run = make_run([f"{number:03}.png" for number in range(200)], per_shard=200)
    seen: list[object] = []

    def end_at_first(rows: list[object]) -> None:
        if not seen:
            for pid in actor_processes():
                os.kill(pid, signal.SIGTERM)
        seen.extend(rows)

    RayRunner(max_workers=1).run(run.shards, run.context, on_outcomes=end_at_first)
    rows = check_complete(run)
    assert len(seen) == 200
    assert len(run.directory.parts()) == 2
    assert {row["attempt"] for row in rows.values()} == {1}


def test_sigterm_has_workers_commit_and_the_run_can_go_on(ray_cluster: str, make_run: MakeRun) -> None:
    run = make_run([f"{number:03}.png" for number in range(200)], per_shard=200)
    seen: list[object] = []

    def end_at_first(rows: list[object]) -> None:
        if not seen:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.extend(rows)

    with pytest.raises(InterruptedBySignalError):
        RayRunner(max_workers=1).run(run.shards, run.context, on_outcomes=end_at_first)
    assert len(rows_of(run)) == len(seen)
    assert 0 < len(seen) < 200
    drive(RayRunner(max_workers=1), run.context, run.shards)
    assert len(check_complete(run)) == 200


def test_workers_that_cannot_start_end_the_run_with_their_log(ray_cluster: str, make_run: MakeRun) -> None:
    run = make_run(NAMES, weights_sha256="f" * 64)
    with pytest.raises(RunError, match=r"3 workers in a row.*run was started with ffff.*worker-0\.log"):
        drive(RayRunner(max_workers=1), run.context, run.shards)


def test_a_machine_that_sees_another_folder_writes_nothing_into_it(ray_cluster: str, make_run: MakeRun) -> None:
    run = make_run(NAMES)
    run.directory.job_path.unlink()
    before = sorted(run.directory.root.rglob("*"))
    with pytest.raises(RunError, match="all machines of a run need the same OUT"):
        drive(RayRunner(max_workers=1), run.context, run.shards)
    assert sorted(run.directory.root.rglob("*")) == before


def test_a_machine_with_other_code_does_nothing(
    ray_cluster: str, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(NAMES)
    monkeypatch.setattr(ray_runner, "code_digest", lambda: "0" * 32)
    place = re.escape(str(Path(ray_runner.__file__).parents[1]))
    with pytest.raises(RunError, match=rf"need the same dfpir: on {socket.gethostname()}, the code in {place} is not"):
        drive(RayRunner(max_workers=1), run.context, run.shards)
    assert rows_of(run) == {}


def test_code_that_differs_in_a_byte_or_a_name_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_cluster_module, "CODE", tmp_path)
    source = tmp_path / "models" / "tiling.py"
    source.parent.mkdir()
    digests = set()
    for text in ("SIDE = 8", "SIDE = 9"):
        source.write_text(text)
        digests.add(ray_cluster_module.code_digest())
    source.rename(source.with_name("tiles.py"))
    digests.add(ray_cluster_module.code_digest())
    assert len(digests) == 3
    ray_cluster_module.require_code(ray_cluster_module.code_digest())


@pytest.mark.parametrize(
    ("error", "seconds", "alive", "booked"),
    [
        (ActorUnavailableError("socket closed", None), 29.0, True, []),
        (ActorUnavailableError("socket closed", None), 29.0, False, ["lost"]),
        (ActorUnavailableError("socket closed", None), 31.0, True, ["died"]),
        (RayActorError(error_msg="its worker process has died"), 4.0, True, []),
        (RayActorError(error_msg="its worker process has died"), 4.0, False, ["lost"]),
        (RayActorError(error_msg="its worker process has died"), 6.0, True, ["died"]),
        (RayActorError(preempted=True), 1.0, True, ["lost"]),
        (OutOfMemoryError("the node ran low on memory"), 6.0, True, ["died"]),
    ],
)
def test_a_death_with_its_machine_is_told_from_one_alone(
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    error: RayError,
    seconds: float,
    alive: bool,
    booked: list[str],
) -> None:
    run = make_run(["a.png"])
    found: list[str] = []
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)
    monkeypatch.setattr(dispatcher, "died", lambda *_: found.append("died"))
    monkeypatch.setattr(dispatcher, "machine_lost", lambda *_: found.append("lost"))
    monkeypatch.setattr(ray_runner, "all_nodes", lambda: [node(1), node(2, alive=alive)])
    crew = ray_runner._Crew(run.context, Needs(cpus=1), dispatcher, room=3)
    crew._note_end(
        ray_runner._Member(0, None, Path("log"), node_id="2-0", assignment=dispatcher.take(0, {0: "here"})), error
    )
    later = time.monotonic() + seconds
    monkeypatch.setattr(ray_runner.time, "monotonic", lambda: later)
    crew._book_fallen()
    assert found == booked


NODE_DIED = """The actor died unexpectedly before finishing this task.
    class_name: WorkerActor
    The actor died because its node has died. Node Id: 42e385
    The actor never ran - it was cancelled before it started running."""


@pytest.mark.parametrize(
    ("error", "ends_the_run"),
    [
        (RayActorError(error_msg=NODE_DIED), False),
        (ActorUnavailableError("socket closed", None), False),
        (RayActorError(preempted=True), False),
        (RayActorError(error_msg="The actor is dead because its worker process has died"), True),
    ],
)
def test_workers_that_are_put_on_a_lost_machine_have_not_failed_to_start(
    make_run: MakeRun, error: RayActorError, ends_the_run: bool
) -> None:
    run = make_run(["a.png"])
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None)
    crew = ray_runner._Crew(run.context, Needs(cpus=1), dispatcher, room=3)
    with pytest.raises(RunError, match=r"3 workers in a row.*worker process") if ends_the_run else nullcontext():
        for _ in range(3):
            crew._note_end(ray_runner._Member(0, None, Path("log")), error)
    assert dispatcher.is_of_use(0) != ends_the_run


def test_the_line_that_tells_of_a_lost_machine_is_picked() -> None:
    assert ray_runner._short(RayActorError(error_msg=NODE_DIED)).startswith("The actor died because its node has died")


def test_a_worker_that_ray_killed_for_memory_is_told_as_such_and_without_rays_advice() -> None:
    told = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 2.07GB used"
    advice = "Refer to the documentation on how to address the out of memory issue. Set max_restarts to enable retry."
    assert ray_runner._short(OutOfMemoryError(f"{told}\nTop 10 memory users\n{advice}")) == told


NOT_THERE = """The actor died because of an error raised in its creation task, ray::W (pid=1, ip=192.0.2.2, id=1)
  {}:
RuntimeError: further lines
ModuleNotFoundError: No module named 'jobs'"""


@pytest.mark.parametrize(
    "how",
    [
        "At least one of the input arguments for this task could not be computed",
        "The actor with name WorkerActor failed to import on the worker. This may be because needed",
    ],
)
def test_a_node_without_dfpir_is_named(how: str) -> None:
    told = "ModuleNotFoundError: No module named 'jobs', on 192.0.2.2: every node needs the same dfpir"
    assert ray_runner._short(RayActorError(error_msg=NOT_THERE.format(how))) == told


def test_a_client_server_without_dfpir_is_told(make_run: MakeRun, no_ray: pytest.MonkeyPatch) -> None:
    def lack(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'jobs'")

    no_ray.setattr(ray_runner, "connected", lambda *_, **__: nullcontext())
    no_ray.setattr(ray_runner, "all_nodes", lambda: [node(1)])
    no_ray.setattr(ray_runner._Crew, "work", lack)
    run = make_run(["a.png"])
    with pytest.raises(RunError, match="the head of the Ray cluster needs the same dfpir"):
        RayRunner().run(run.shards, run.context, on_outcomes=lambda rows: None)


def test_rays_guesses_are_no_part_of_how_a_worker_died() -> None:
    told = (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: x."
    )
    guesses = " Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, (2)"
    assert ray_runner._short(RayActorError(error_msg=told + guesses)) == told


def test_no_more_workers_are_asked_for_than_there_is_work_and_room_for(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run([f"{number}.png" for number in range(4)], per_shard=1)
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=9)
    crew = ray_runner._Crew(run.context, Needs(cpus=1), dispatcher, room=3)
    monkeypatch.setattr(crew, "_hire", lambda n: crew._members.update({n: ray_runner._Member(n, None, Path("log"))}))
    crew._hire_as_wanted()
    assert sorted(crew._members) == [0, 1, 2, 3]
    fallen = crew._members.pop(2)
    fallen.assignment = dispatcher.take(0, {0: "here"})
    crew._note_end(fallen, RayActorError())
    crew._hire_as_wanted()
    assert sorted(crew._members) == [0, 1, 2, 3], "the one that stands in loads while it is found out how this one fell"
    dispatcher.workers = 3
    del crew._members[0], crew._members[1]
    crew._hire_as_wanted()
    assert sorted(crew._members) == [0, 2, 3]


@pytest.mark.parametrize(("third_is_elsewhere", "takes_it"), [(True, False), (False, True)])
def test_two_workers_of_one_machine_do_not_confirm_each_other_where_another_one_has_any(
    make_run: MakeRun, third_is_elsewhere: bool, takes_it: bool
) -> None:
    run = make_run(["a.png"])
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=3)
    crew = ray_runner._Crew(run.context, Needs(cpus=1), dispatcher, room=3)
    for number, home in enumerate(["here", "here", "there" if third_is_elsewhere else "here"]):
        crew._homes[number] = home
        crew._members[number] = ray_runner._Member(number, MagicMock(), Path("log"), node_id=home)
    dispatcher.take(0, {0: "here", 1: "here"})
    dispatcher.doubted("s000")
    crew._give(crew._members[1])
    assert (crew._members[1].assignment is not None) == takes_it
    crew._give(crew._members[2])
    assert (crew._members[2].assignment is not None) != takes_it


@pytest.mark.parametrize(
    ("room", "seconds", "has_failed", "takes_it"),
    [(2, 0, False, False), (1, 0, False, True), (2, 61, False, True), (2, 0, True, True)],
)
def test_a_doubt_waits_for_a_worker_that_loads_and_for_which_there_is_room(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, room: int, seconds: float, has_failed: bool, takes_it: bool
) -> None:
    run = make_run(["a.png"])
    dispatcher = Dispatcher(run.shards, run.context, lambda rows: None, workers=2)
    crew = ray_runner._Crew(run.context, Needs(cpus=1), dispatcher, room=room)
    for number, home in enumerate(["here", None]):
        crew._members[number] = ray_runner._Member(number, MagicMock(), Path("log"), node_id=home)
    dispatcher.take(0, {0: "here"})
    dispatcher.doubted("s000")
    if has_failed:
        dispatcher.start_failed(1, "no weights", "log", others_work=True)
    later = time.monotonic() + seconds
    monkeypatch.setattr(ray_runner.time, "monotonic", lambda: later)
    crew._give(crew._members[0])
    assert (crew._members[0].assignment is not None) == takes_it


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ray as if it were not connected, to have its functions replaced."""
    for name, function in {"is_initialized": lambda: False, "init": lambda **_: None, "shutdown": lambda: None}.items():
        monkeypatch.setattr(ray_cluster_module.ray, name, function)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return monkeypatch


def test_what_ray_prints_at_its_end_does_not_come_among_a_commands_results(
    no_ray: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_ray.setattr(ray_cluster_module.ray, "shutdown", lambda: print("a worker died"))
    with connected(None, threads=1):
        print("another worker died")
    assert capsys.readouterr() == ("", "another worker died\na worker died\n")


def test_a_lost_connection_is_told_and_no_cluster_started_to_end_actors_on(
    make_run: MakeRun, no_ray: pytest.MonkeyPatch
) -> None:
    def lose(*_: object) -> None:
        raise ConnectionError("Client is shutting down.")

    no_ray.setattr(ray_runner, "connected", lambda *_, **__: nullcontext())
    no_ray.setattr(ray_runner, "all_nodes", lambda: [node(1)])
    no_ray.setattr(ray_runner._Crew, "work", lose)
    no_ray.setattr(ray_runner._Crew, "dismiss", lambda _: pytest.fail("Ray was asked"))
    run = make_run(["a.png"])
    with pytest.raises(RunError, match=r"connection to the Ray cluster was lost .*the same command goes on"):
        RayRunner().run(run.shards, run.context, on_outcomes=lambda rows: None)


def test_sigterm_while_ray_starts_is_told_as_any_other(no_ray: pytest.MonkeyPatch) -> None:
    def ended(**_: object) -> None:
        sys.exit(signal.SIGTERM)  # as Ray's own handler does

    no_ray.setattr(ray_cluster_module.ray, "init", ended)
    with pytest.raises(InterruptedBySignalError, match="ended by SIGTERM"), connected(None, threads=1):
        pass


def test_a_home_folder_that_cannot_be_written_is_no_hindrance(no_ray: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        if not os.environ.get("RAY_AUTH_TOKEN"):  # Ray would put one there
            raise OSError(errno.EROFS, "Read-only file system", "/.ray")

    no_ray.setenv("RAY_AUTH_TOKEN", "")
    no_ray.delenv("RAY_AUTH_TOKEN")
    no_ray.setattr(ray_cluster_module.ray, "init", init)
    with connected(None, threads=1):
        pass


def test_an_empty_address_in_the_environment_is_none(no_ray: pytest.MonkeyPatch) -> None:
    addresses: list[object] = []
    no_ray.setattr(ray_cluster_module.ray, "init", lambda **options: addresses.append(options["address"]))
    no_ray.setenv("RAY_ADDRESS", "")
    with connected(None, threads=1):
        assert addresses == ["local"]


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "no-such-host.invalid", "ray://127.0.0.1", "ray://[::1]"])
def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(ray_cluster_module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster_module.ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with pytest.raises(UsageError, match=r"no Ray cluster answers at .*:"), connected(f"{host}:{port}", threads=1):
        pass


def test_an_address_where_something_else_answers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster_module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster_module.ray, "init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setattr(ray_cluster_module, "HEAD_ANSWER_WITHIN_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UsageError, match=r"something else than a Ray head.*6379"), connected(address, threads=1):
            pass


def test_a_ray_head_answers(ray_cluster: str) -> None:
    ray_cluster_module._check_answers(ray_cluster)


@pytest.mark.parametrize("mode", [None, "token"])
def test_a_head_that_asks_for_a_token_is_refused_with_what_to_do(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    if "RAY_AUTH_MODE" not in os.environ:
        pytest.skip("this version of Ray makes no token by itself")
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    else:
        monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(UsageError, match=f"{ray_cluster} asks for a token; set RAY_AUTH_MODE=token"):
        ray_cluster_module._check_answers(ray_cluster)


def test_a_ray_client_without_an_answer_is_told_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_in_vain(**_: object) -> None:
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(ray_cluster_module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster_module.ray, "init", wait_in_vain)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UsageError, match=r"timeout; if it asks for a token"), connected(address, threads=1):
            pass
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        with pytest.raises(UsageError, match=r"timeout$"), connected(address, threads=1):
            pass


@pytest.mark.parametrize(("threads", "cpus"), [(1, 2), (4, 4)])
def test_a_cluster_started_here_has_the_cpus_that_this_process_is_bound_to(
    monkeypatch: pytest.MonkeyPatch, threads: int, cpus: int
) -> None:
    started: list[int] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 6})
    monkeypatch.setattr(ray_cluster_module, "start_local", lambda *, cpus: started.append(cpus))
    for name in ("is_initialized", "shutdown"):
        monkeypatch.setattr(ray_cluster_module.ray, name, lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with connected(None, threads=threads):
        assert started == [cpus]


def test_a_ray_that_does_not_start_is_said_to_need_room_for_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full /tmp it waits in vain for a file there, and says no more than that."""

    def wait_in_vain(**_: object) -> None:
        raise RuntimeError("Timed out waiting for file /tmp/ray/session/gcs_server_port")

    monkeypatch.setattr(ray_cluster_module.ray, "init", wait_in_vain)
    monkeypatch.setattr(ray_cluster_module.ray, "shutdown", lambda: None)
    with pytest.raises(
        RunError, match=r"gcs_server_port\); .* make room where it keeps its files \(TMPDIR, else /tmp\)"
    ):
        ray_cluster_module.start_local(cpus=1)


def test_workers_of_a_cluster_started_here_are_as_nice_as_this_process(ray_cluster: str) -> None:
    niceness = ray.remote(num_cpus=0)(lambda: os.nice(0)).remote()
    assert ray.get(niceness) == os.nice(0)


def test_what_ray_prints_is_not_taken_for_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answer in (("is_initialized", False), ("init", None), ("shutdown", None)):
        monkeypatch.setattr(ray_cluster_module.ray, name, lambda answer=answer, **_: answer)
    with connected("auto", threads=1):
        print("(raylet) A worker died or was killed")
    print("the result")
    assert capsys.readouterr() == ("the result\n", "(raylet) A worker died or was killed\n")


def test_ray_takes_no_place_of_the_commands_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster_module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster_module.ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    monkeypatch.setattr(ray_cluster_module.ray, "shutdown", lambda: None)
    with pytest.raises(InterruptedBySignalError), signals_raise(), connected("auto", threads=1):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
def test_the_cluster_decides_about_the_device(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch, gpus: int, device: str
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 8.0, "GPU": float(gpus)}}]
    monkeypatch.setattr(ray_cluster_module, "all_nodes", lambda: nodes)
    options = RestoreOptions(address="there:6379")
    assert resolve_run_device(options) == device
    wanted = options.model_copy(update={"device": "cuda"})
    if gpus:
        assert resolve_run_device(wanted) == "cuda"
    else:
        with pytest.raises(UsageError, match="the Ray cluster at there:6379 has no GPU"):
            resolve_run_device(wanted)
    assert resolve_run_device(options.model_copy(update={"device": "cpu"})) == "cpu"


@pytest.mark.slow
def test_the_loss_of_a_node_in_the_middle_loses_no_row_doubles_none_and_blames_no_image(tmp_path: Path) -> None:
    model, classifier = write_tiny_model(tmp_path / "m.safetensors"), write_tiny_classifier(tmp_path / "c.safetensors")
    write_pictures(tmp_path / "src", [f"{number:03d}.png" for number in range(400)])
    out = tmp_path / "out"
    options = ["--label", "rain", "--device", "cpu", "--dtype", "float32", "--max-workers", "2"]
    weights = ["--model", str(model), "--classifier", str(classifier)]
    command = [sys.executable, "-m", "jobs.cli", "restore", str(tmp_path / "src"), str(out), *options, *weights]
    script = Path(__file__).with_name("losing_cluster.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(out), *command], capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = audit(out, contents=True, sources=True, watch=lambda checks, total: checks)
    assert found.findings == []
    assert found.counts["restored"] == found.rows == 400
    assert set(read_rows(out, columns=["attempt"])["attempt"].to_pylist()) == {1}
