import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

STUB = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" && cp "$0" "$3/bin/uv"
else [ "$2" != pip ] || [ -x "$(dirname "$0")/pip" ]; fi
"""
"""Makes environments of itself, in which `-m pip` is known once they are whole."""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_set_up_that_was_cut_off_before_pip_was_there_is_taken_up(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    begun = tmp_path / ".venv" / "bin" / "python"
    begun.parent.mkdir(parents=True)
    for path in (python, begun):
        path.write_text(STUB)
        path.chmod(0o755)
    fresh = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    subprocess.run(["make", ".venv/.ready", f"PYTHON={python}"], cwd=tmp_path, env=fresh, check=True)
    assert (tmp_path / ".venv" / ".ready").exists()
