"""What the benchmarks share, and what they measure."""

import csv
import subprocess
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from benchmarks import quality, windows
from benchmarks.record import hardware, spread, write_csv
from classifier.labels import Degradation
from pipeline.synthesis import damaged, draw_recipe, from_uint8, to_uint8


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_was_measured_is_written_though_the_file_has_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_csv(path, [{"engine": "local", "workers": 1}])
    write_csv(path, [{"engine": "ray", "niceness": 15}], add=True)
    rows = table(path)
    assert [list(row.values())[:3] for row in rows] == [["local", "", "1"], ["ray", "15", ""]]
    assert list(rows[0]) == ["engine", "niceness", "workers", "hardware", "torch", "commit"]


def test_where_nothing_was_measured_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_csv(path, [{"engine": "local"}])
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="nothing was measured"):
        write_csv(path, [])
    assert path.read_bytes() == before


def test_what_a_processor_did_is_not_put_down_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "H100")
    assert hardware("cuda") == "H100"
    assert "H100" not in hardware("cpu")


def test_rounds_are_told_by_their_median_lowest_and_highest_ratio() -> None:
    assert spread([3.0, 1.0, 1.5, 9.0, 1.25]) == {"ratio": 1.5, "ratio_low": 1.0, "ratio_high": 9.0}


def test_quality_counts_as_recognised_what_is_right_and_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"a": ("rain", "restored"), "b": ("rain", "abstained"), "c": ("clean", "copied"), "d": ("rain", "failed")}
    empty = dict.fromkeys(quality.IMAGE_COLUMNS)
    rows = {path: empty | {"label": label, "status": status} for path, (label, status) in found.items()}
    means = dict.fromkeys(("psnr_input_db", "psnr_db", "ssim_input", "ssim"))
    monkeypatch.setattr(quality, "restore", lambda *_: (means, rows))
    summary, images = quality.measure(quality.Set("rain", tmp_path, Degradation.RAIN, None), tmp_path, [])
    assert summary["recognised"] == 1 / 4
    assert len(images) == 4


def test_quality_says_why_a_run_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = subprocess.CompletedProcess([], 1, stdout="", stderr="dfpir: every worker failed")
    monkeypatch.setattr(subprocess, "run", Mock(return_value=broken))
    with pytest.raises(SystemExit, match="every worker failed"):
        quality.restore(tmp_path, tmp_path / "out")


def test_quality_counts_no_photographs_of_an_earlier_call(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name / "cbsd68").mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / "cbsd68" / f"{name}.png")
        made = quality.noisy(tmp_path / name, tmp_path / "work", 25)
        assert [path.name for path in made.source.iterdir()] == [f"{name}.png"]


@pytest.mark.parametrize("label", ["rain", "lowlight"])
def test_windows_are_measured_on_the_damage_of_what_is_to_come_of_it(label: str) -> None:
    clean, rng = data.coffee()[:64, :96], np.random.default_rng(3)
    image, wanted, prompt = windows.degraded(clean, Degradation(label), np.random.default_rng(3))
    assert prompt == label
    assert np.array_equal(wanted, clean) == (label == "rain")
    expected = damaged(from_uint8(wanted), draw_recipe(Degradation(label), rng, 64, 96))
    np.testing.assert_array_equal(image, to_uint8(expected))
