import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image
from rich.console import Console

from jobs import demo
from jobs.demo import MARKER, run_demo
from jobs.errors import InterruptedBySignalError, RunError, UsageError
from jobs.places import locked


@pytest.mark.slow
def test_the_demonstration_restores_blindly_and_harms_nothing(tmp_path: Path) -> None:
    console = Console(width=80, record=True, quiet=True)
    out = tmp_path / "demo"
    results = {row.damage: row for row in run_demo(out, engine="local", messages=console, results=console)}
    gains = {damage: row.psnr_db - row.psnr_input_db for damage, row in results.items()}
    assert all(gains[damage] > 0.2 for damage in ("noise", "rain", "haze", "lowlight")), gains
    assert all(gains[damage] >= 0 for damage in ("blur", "clean")), gains
    assert Image.open(out / "before-after.png").width > 900
    assert [row["damage"] for row in json.loads((out / MARKER).read_text())] == list(results)


def test_a_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run_demo(tmp_path, engine="local", messages=Console(quiet=True), results=Console(quiet=True))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_earlier_demonstration_stays_until_another_one_begins(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.json").write_text("{}")
    with pytest.raises(UsageError, match="--engine spark"):
        run_demo(tmp_path, engine="spark", messages=Console(quiet=True), results=Console(quiet=True))
    with locked(tmp_path / MARKER, tmp_path), pytest.raises(UsageError, match="another process is working on"):
        run_demo(tmp_path, engine="local", messages=Console(quiet=True), results=Console(quiet=True))
    assert (tmp_path / "run" / "job.json").exists()


def test_an_image_that_fails_ends_it_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs = {name: pixels[:64, :64] for name, pixels in demo.photographs().items() if name == "chelsea"}
    monkeypatch.setattr(demo, "photographs", lambda: photographs)
    monkeypatch.setenv("DFPIR_FAULT", "raise:decode:noise/chelsea.png")
    with pytest.raises(RunError, match=r"16\.7% of the images failed"):
        run_demo(tmp_path / "demo", engine="local", messages=Console(quiet=True), results=Console(quiet=True))


def test_one_that_is_ended_does_not_promise_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run", Mock(side_effect=InterruptedBySignalError(15)))
    with pytest.raises(InterruptedBySignalError, match=r"^ended by SIGTERM$"):
        run_demo(tmp_path / "demo", engine="local", messages=Console(quiet=True), results=Console(quiet=True))
