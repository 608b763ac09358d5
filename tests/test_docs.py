import csv
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from jobs.audit import Kind
from pipeline.records import MANIFEST_SCHEMA

ROOT = Path(__file__).parent.parent


def _names_in_first_column(heading: str) -> set[str]:
    """Of the table under a heading of `docs/manifest.md`."""
    text = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", section, flags=re.MULTILINE)
    return {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_manifest_column_is_documented_and_no_other() -> None:
    assert _names_in_first_column("Columns") == set(MANIFEST_SCHEMA.names)


def test_everything_that_an_audit_finds_is_documented_and_no_other() -> None:
    assert _names_in_first_column("Whether it all holds") == set(get_args(Kind))


def test_the_lock_file_holds_no_addresses() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert lines
    assert [line for line in lines if "://" in line or line.startswith("-")] == []


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n)+", text, flags=re.MULTILINE)]
    one, whole = [block for block in blocks if block.strip()][:2]
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    names: dict[str, Any] = {"image": image}
    exec(one, names)
    assert names["decision"].prompt == "noise50"
    assert names["restored"].shape == image.shape
    (tmp_path / "PHOTOGRAPHS").mkdir()
    Image.fromarray(image).save(tmp_path / "PHOTOGRAPHS" / "a.png")
    (tmp_path / "whole.py").write_text(whole)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told = subprocess.run([sys.executable, "whole.py"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "'restored': 1" in told


def test_the_packages_say_that_they_are_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in settings["packages"]:
        assert "py.typed" in settings["package-data"][package]
        assert (ROOT / package / "py.typed").is_file()


QUALITY_SETS = {
    "cbsd68-sigma15": "CBSD68, sigma 15",
    "cbsd68-sigma25": "CBSD68, sigma 25",
    "cbsd68-sigma50": "CBSD68, sigma 50",
    "rain": "rain, 4 synthetic pairs",
    "haze": "haze, 4 RESIDE indoor pairs",
    "lowlight": "low light, 20 under-exposed (MEFB), fused reference",
    "real_noise": "real camera noise, 7 pairs (Nam et al.)",
    "urban-levin09": "10 photographs x 4 measured blur kernels (Levin et al.)",
}


def test_the_readme_has_the_figures_of_the_quality_benchmark() -> None:
    with (ROOT / "benchmarks" / "results" / "quality.csv").open(encoding="utf-8", newline="") as file:
        measured = {row["set"]: row for row in csv.DictReader(file)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for name, title in QUALITY_SETS.items():
        row = measured[name]
        before, after, given = (float(row[column]) for column in ("psnr_input_db", "psnr_db", "psnr_told_db"))
        assert (
            f"| {title} | {row['images']} | {float(row['recognised']):.0%} | {before:.2f} dB | {after:.2f} dB "
            f"| {after - before:+.2f} | {given:.2f} dB | {float(row['ssim_input']):.3f} | {float(row['ssim']):.3f} |"
        ) in readme


def test_the_readme_has_the_speed_that_the_worker_benchmark_found_on_cpus() -> None:
    """Of default runs: with a second look, in the precision that is fastest there."""
    with (ROOT / "benchmarks" / "results" / "worker.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    speeds = [
        float(row["worker_megapixels_per_s"])
        for row in rows
        if (row["device"], row["model"], row["second_look"]) == ("cpu", "dfpir-compact", "True")
        and (row["dtype"] == "bfloat16" or "avx512" in row["hardware"])
    ]
    told = f"AVX-512 or AMX restored {min(speeds):.1f} to {max(speeds):.1f} megapixels per second"
    assert told in (ROOT / "README.md").read_text(encoding="utf-8")
