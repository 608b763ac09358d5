import importlib
import os
from pathlib import Path

import pytest

import jobs
from jobs.cpus import available_cpus


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The control group of a container that is bound to eight CPUs."""
    monkeypatch.setattr("jobs.cpus.GROUP", tmp_path)
    monkeypatch.setattr("jobs.cpus.bound_cpus", lambda: 8)
    (tmp_path / "cpu").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 8), ("400000 100000", 4), ("50000 100000", 1), ("250000 100000", 3), ("1600000 100000", 8)],
)
def test_a_containers_quota_counts(group: Path, quota: str, cpus: int) -> None:
    (group / "cpu.max").write_text(f"{quota}\n")
    assert available_cpus() == cpus


@pytest.mark.parametrize(("quota", "cpus"), [(-1, 8), (200000, 2)])
def test_a_quota_of_the_first_version_of_groups_counts(group: Path, quota: int, cpus: int) -> None:
    (group / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert available_cpus() == cpus


@pytest.mark.parametrize(
    ("given", "quota", "threads"), [(None, "200000", "2"), ("5", "200000", "5"), (None, "max", None)]
)
def test_torch_gets_no_more_threads_than_that_unless_the_user_says_so(
    group: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, quota: str, threads: str | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    (group / "cpu.max").write_text(f"{quota} 100000\n")
    importlib.reload(jobs)
    assert os.environ.get("OMP_NUM_THREADS") == threads
