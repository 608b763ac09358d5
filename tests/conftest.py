"""What many tests share: tiny weights, planned runs, and one Ray cluster for the whole session."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, chdir, contextmanager
from pathlib import Path

import pytest
from in_this_process import InThisProcess
from synthetic_classifier import write_tiny_classifier
from synthetic_weights import write_tiny_model
from tiny_runs import TinyRun, TinyWeights, config_of, plan_run, write_pictures

from models.weights import load_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[[str], AbstractContextManager[None]]:
    """For a command that is to end with exit code 2, telling what the pattern finds."""

    @contextmanager
    def with_words(pattern: str) -> Iterator[None]:
        with pytest.raises(SystemExit) as end:
            yield
        assert end.value.code == 2
        assert re.search(pattern, capsys.readouterr().err)

    return with_words


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> TinyWeights:
    from classifier import load_classifier

    folder = tmp_path_factory.mktemp("weights")
    model = write_tiny_model(folder / "tiny.safetensors")
    classifier = write_tiny_classifier(folder / "tiny-classifier.safetensors")
    return TinyWeights(model, load_checkpoint(model).sha256, classifier, load_classifier(classifier).sha256)


@pytest.fixture
def make_run(tmp_path: Path, tiny_weights: TinyWeights) -> Callable[..., TinyRun]:
    """Plans runs with tiny real weights over pictures of the given names, in a folder of their own."""

    def make(names: Sequence[str], *, out: str = "out", per_shard: int = 3, **changes: object) -> TinyRun:
        source = tmp_path / "source"
        if not source.exists():
            write_pictures(source, names)
        return plan_run(source, tmp_path / out, config_of(tiny_weights, **changes), per_shard=per_shard)

    return make


@pytest.fixture
def child_processes() -> None:
    """For a test whose commands are to have the workers that they have for users."""


@pytest.fixture
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of commands start no workers, each of which takes seconds, unless a test asks for `child_processes`."""
    if "child_processes" not in request.fixturenames:
        monkeypatch.setattr("jobs.restore.make_runner", lambda options: InThisProcess())


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The one cluster of the test session, with room for two workers: its address.

    It is started where every package of the project has a namesake, which no worker may import.
    """
    import ray

    from jobs.ray_cluster import start_local

    elsewhere = tmp_path_factory.mktemp("repository")
    for name in ("models", "classifier", "pipeline", "jobs"):
        (elsewhere / name).mkdir()
        (elsewhere / name / "__init__.py").write_text("raise ImportError('a package of the working directory')\n")
    with chdir(elsewhere):
        start_local(cpus=2)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
