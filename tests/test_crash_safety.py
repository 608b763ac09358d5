"""kill -9 of the driver at each step of the commit, then the same run again: nothing lost, nothing done twice."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_driver import drive, make_runner
from tiny_runs import TinyRun, check_complete, rows_of, stalled_process

from pipeline.faults import FAULT, MARKER

ROOT = Path(__file__).parent.parent
NAMES = ["a.png", "b.png", "c.png", "d.png", "e.png"]
STEPS = {
    "before an image's rename": "stall:before-rename:d.png",
    "between images and manifest part": "stall:after-image:d.png",
    "after the manifest part": "stall:after-part:s001",
}
OF_A_CLUSTER = {"between images and manifest part", "after the manifest part"}
"""On Ray the driver joins a running cluster, which has to end its workers; else one of its own ends with it."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminals_signal_ends_no_local_worker_with_work_in_hand(
    number: signal.Signals, make_run: Callable[..., TinyRun], tmp_path: Path
) -> None:
    """It reaches the whole process group."""
    run = make_run(NAMES, per_shard=2)
    (tmp_path / "run.pickle").write_bytes(pickle.dumps((run.context, run.shards)))
    environment = os.environ | {
        FAULT: "stall:before-rename:d.png", MARKER: str(tmp_path / "marker"), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "run_driver.py"), "local", str(tmp_path / "run.pickle")]
    driver = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # these tests may run under `nohup`
    )
    try:
        worker = stalled_process(tmp_path / "marker")
        os.killpg(driver.pid, number)
        with pytest.raises(subprocess.TimeoutExpired):
            driver.wait(timeout=2)  # for the worker to commit what it has in hand
        os.kill(worker, 0)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        told = driver.communicate()[1]
    assert b"stopping as soon as what is in hand is done" in told


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.ray])])
def test_a_run_whose_driver_is_killed_goes_on_to_the_same_end(
    engine: str, step: str, make_run: Callable[..., TinyRun], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = make_run(NAMES, per_shard=2)
    (tmp_path / "run.pickle").write_bytes(pickle.dumps((run.context, run.shards)))
    marker = tmp_path / "marker"
    environment = os.environ | {FAULT: STEPS[step], MARKER: str(marker), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    if engine == "ray" and step in OF_A_CLUSTER:
        environment["RAY_ADDRESS"] = request.getfixturevalue("ray_cluster")
    command = [sys.executable, str(ROOT / "tests" / "run_driver.py"), engine, str(tmp_path / "run.pickle")]
    driver = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        stalled_process(marker)
        assert driver.poll() is None
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()

    committed = rows_of(run)
    assert {"a.png", "b.png"} <= set(committed)
    assert ("d.png" in committed) == (step == "after the manifest part")
    outputs = {name: run.directory.root / row["output_uri"] for name, row in committed.items()}
    written = {name: path.stat() for name, path in outputs.items()}

    if engine == "ray":
        request.getfixturevalue("ray_cluster")
    reported = drive(make_runner(engine), run.context, run.shards)

    rows = check_complete(run)
    assert {row["status"] for row in rows.values()} == {"restored"}
    assert {name: rows[name] for name in committed} == committed
    for name, path in outputs.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (written[name].st_mtime_ns, written[name].st_ino)
    assert sorted(reported) == sorted(row["image_id"] for name, row in rows.items() if name not in committed)
