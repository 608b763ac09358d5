import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_licence_is_that_of_the_code_and_of_all_shipped_weights() -> None:
    cards = [*(ROOT / "models" / "shipped").glob("*.json"), *(ROOT / "classifier" / "shipped").glob("*.json")]
    weights = {json.loads(card.read_text(encoding="utf-8"))["licence"] for card in cards}
    assert {"Apache-2.0", *weights} == set(PROJECT["project"]["license"].split(" AND "))


def test_a_source_distribution_has_no_tests_without_what_they_import(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    folders = PROJECT["tool"]["setuptools"]["packages"]
    for folder in (*folders, "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("shipped", "golden", "*.so"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    [archive] = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {"models/native.c", "jobs/cli.py", "pyproject.toml"} <= names
    assert not any(name.startswith("tests") for name in names)
