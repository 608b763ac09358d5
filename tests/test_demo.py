import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from jobs.demo import MARKER, run_demo
from jobs.errors import UsageError


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
