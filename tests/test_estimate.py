import os

import pytest
from PIL import Image

from pipeline.estimate import estimate
from pipeline.source import list_source


def test_estimate_adds_up_what_headers_say(tmp_path):
    for i in range(4):
        Image.new("RGB", (500, 400)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (500, 400)).save(tmp_path / "photo.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    found = estimate(list_source(tmp_path).table["uri"])
    assert (found.sampled, found.unreadable) == (6, 1)
    assert found.unreadable_fraction == pytest.approx(1 / 6)
    assert found.megapixels == pytest.approx(1.0)
    smaller = estimate(list_source(tmp_path).table["uri"], output_format="webp")
    assert 0 < smaller.output_bytes < found.output_bytes


def test_an_estimate_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("pipe.png\n")
    found = estimate(list_source(tmp_path / "list.txt").table["uri"])
    assert (found.sampled, found.unreadable) == (1, 1)


def test_estimate_extrapolates_from_a_seeded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.estimate.SAMPLE_IMAGES", 5)
    for i in range(20):
        Image.new("L", (100, 10 * (i + 1))).save(tmp_path / f"{i}.png")
    source = list_source(tmp_path).table["uri"]
    one, two = (estimate(source) for _ in range(2))
    assert one == two
    assert one.sampled == 5
    of_sample_px = one.megapixels * 1e6 * 5 / 20
    assert of_sample_px == pytest.approx(round(of_sample_px, -3))
    assert 1_000 * sum(range(1, 6)) <= of_sample_px <= 1_000 * sum(range(16, 21))
