import errno
import gc
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from synthetic_weights import tiny_network
from tiny_runs import TinyRun, check_complete, config_of, lasting, plan_run, rows_of, write_pictures

from classifier.base import Prediction
from classifier.labels import LABELS, Degradation
from classifier.view import Views
from models.memory import bytes_per_pixel
from models.prompts import orthogonal_bank
from models.restorer import Restorer
from pipeline import item as item_module
from pipeline import judge as judge_module
from pipeline import restoring as restoring_module
from pipeline import sink
from pipeline import stages as stages_module
from pipeline import worker as worker_module
from pipeline.faults import FAULT
from pipeline.images import ImageFault, to_uint8
from pipeline.item import Item, SourceGoneError
from pipeline.journal import Journal
from pipeline.metrics import psnr_db
from pipeline.records import ImageRef, Outcome, Shard, Stage, Status
from pipeline.sink import OtherRunError, RunDirectory, done
from pipeline.worker import DoubtfulShardError, ReadAhead, Worker, codec_threads


class Brightener:
    """Restores by adding 10 levels; notes what it is given."""

    name = "brightener"
    prompts = orthogonal_bank()
    size_multiple = 8

    def __init__(self, *, limit: int = 4, memory: int = 100, memory_px: int = 10**6) -> None:
        self.limit, self.memory, self.memory_px = limit, memory, memory_px
        self.batches: list[list[tuple[int, ...]]] = []
        self.prompts_seen: list[str] = []
        self.windows_px: dict[str, int] = {}

    def restore(
        self, images: Sequence[NDArray[Any]], prompt_keys: Sequence[str], *, tile_px: int | None = None
    ) -> list[NDArray[Any]]:
        if len(images) > self.memory or (tile_px or max(images[0].shape[:2])) > self.memory_px:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")
        self.batches.append([image.shape for image in images])
        self.prompts_seen.extend(prompt_keys)
        step = {np.dtype(np.uint8): 10, np.dtype(np.uint16): 2570}
        return [np.minimum(i, np.iinfo(i.dtype).max - step[i.dtype]) + step[i.dtype] for i in images]

    def batch_limit(self, height: int, width: int, *, tile_px: int | None) -> int:
        assert height % self.size_multiple == 0
        assert width % self.size_multiple == 0
        return self.limit

    def tile_px_for(self, height: int, width: int, prompt_key: str) -> int | None:
        return None

    def smaller_tile_px(self, height: int, width: int, *, than: int | None) -> int | None:
        side = (than or max(height, width)) // 2
        return side if side >= 8 else None


class Reader:
    """Classifies by the top left pixel's red value: that of label i is 10 i; 200 is unsure, 210 an exception.

    Noise counts as stronger by 25 than it is.
    """

    name, sha256 = "reader", "1" * 64

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Prediction]:
        raise NotImplementedError

    def take_views(self, image: NDArray[np.uint8]) -> Views:
        return Views(crops=image[None], thumbnail=image)

    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        return [self._one(int(each.thumbnail[0, 0, 0])) for each in views]

    def _one(self, value: int) -> dict[Degradation, float]:
        if value == 210:
            raise RuntimeError("cannot classify this")
        label = LABELS[value // 10] if value < 10 * len(LABELS) else Degradation.RAIN
        sure = 0.3 if value == 200 else 0.94
        return {each: sure if each is label else 0.01 for each in LABELS}

    def prediction(self, probabilities: Mapping[Degradation, float], *, noise_sigma_255: float) -> Prediction:
        label = max(probabilities, key=probabilities.__getitem__)
        confidence = probabilities[label]
        return Prediction(label, confidence, 0.2, 0.9, probabilities, noise_sigma_255=noise_sigma_255 + 25)


def marked(path: Path, value: int, *, height: int = 16, width: int = 16) -> None:
    """A mid-grey PNG, in fine stripes as it is to be no flat drawing, whose top left pixel is `value`."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[:, 1::2] = 127
    pixels[0, 0] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def red(label: Degradation) -> int:
    return 10 * LABELS.index(label)


def rainy(folder: Path, count: int) -> None:
    """Photographs in `src` that are taken for rainy: `0.png` to `3.png`, or `00.png` to `59.png`."""
    for number in range(count):
        marked(folder / "src" / f"{number:0{len(str(count - 1))}}.png", red(Degradation.RAIN))


def work(
    run: TinyRun, restorer: Restorer | Brightener | None = None, *, attempt: int = 1, worker: Worker | None = None
) -> dict[str, dict[str, Any]]:
    """Works off all shards and returns the manifest's rows by relative path."""
    worker = worker or Worker(run.context, restorer=restorer or Brightener(), classifier=Reader(), worker_id="w")
    for shard in run.shards:
        worker(shard, attempt=attempt, on_outcomes=lambda rows: None)
    return rows_of(run)


def plan(tmp_path: Path, **changes: object) -> TinyRun:
    return plan_run(tmp_path / "src", tmp_path / "out", config_of(**({"label": "auto"} | changes)), per_shard=100)


def test_each_label_leads_to_its_status_with_all_that_is_known(tmp_path: Path) -> None:
    for label in LABELS:
        marked(tmp_path / "src" / f"{label}.png", red(label))
    marked(tmp_path / "src" / "unsure.png", 200)
    restorer = Brightener()
    rows = work(plan(tmp_path), restorer)
    expected = {f"{label}.png": Status.RESTORED for label in LABELS}
    expected |= {"clean.png": Status.COPIED, "other.png": Status.ABSTAINED, "unsure.png": Status.ABSTAINED}
    assert {name: row["status"] for name, row in rows.items()} == expected
    assert sorted(restorer.prompts_seen) == ["blur", "haze", "lowlight", "noise25", "rain"]
    noise = rows["noise.png"]
    for column in ("source_sha256", "width", "mode", "confidence", "probabilities", "noise_sigma_255", "prompt",
                   "decision_reason", "batch_size", "started_at", "finished_at", "fetch_ms", "decode_ms", "classify_ms",
                   "restore_ms", "measure_ms", "encode_ms", "write_ms", "output_sha256", "output_format", "output_mode",
                   "clean_probability_before", "clean_probability_after", "host", "weights_sha256"):  # fmt: skip
        assert noise[column] is not None, column
    assert noise["output_uri"] == "images/noise.png"
    assert noise["change_rmse_255"] == pytest.approx(10)
    assert noise["suspicious"] is False
    for name in ("clean.png", "other.png"):
        assert (tmp_path / "out" / "images" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
        assert rows[name]["output_sha256"] == rows[name]["source_sha256"]
        assert rows[name]["prompt"] is None


def test_results_are_classified_only_if_the_run_asks_for_it(tmp_path: Path) -> None:
    marked(tmp_path / "src" / "a.png", red(Degradation.RAIN))
    (row,) = work(plan(tmp_path, second_look=False)).values()
    assert row["status"] == Status.RESTORED
    assert row["clean_probability_before"] is not None
    assert row["clean_probability_after"] is None


def test_a_bad_file_fails_alone_with_its_stage(tmp_path: Path) -> None:
    source = tmp_path / "src"
    marked(source / "good.png", red(Degradation.RAIN))
    (source / "empty.png").write_bytes(b"")
    (source / "cut.png").write_bytes((source / "good.png").read_bytes()[:40])
    marked(source / "odd.png", 210)
    marked(source / "gone.png", 0)
    marked(source / "huge.png", 0, height=200, width=200)
    run = plan(tmp_path, max_pixels=10_000)
    (source / "gone.png").unlink()
    rows = work(run)
    faults = {name: (row["stage"], row["error_class"]) for name, row in rows.items() if row["status"] == "failed"}
    assert faults == {
        "empty.png": ("decode", "empty_file"),
        "cut.png": ("decode", "truncated"),
        "odd.png": ("classify", "RuntimeError"),
        "gone.png": ("fetch", "missing"),
        "huge.png": ("decode", "too_many_pixels"),
    }
    assert rows["odd.png"]["error_message"] == "cannot classify this"
    assert rows["good.png"]["status"] == "restored"
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["good.png"]


def test_a_source_file_that_became_a_link_to_its_result_does_not_overwrite_it(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for name in ("a.png", "b.png"):
        marked(source / name, red(Degradation.RAIN))
    work(plan(tmp_path))
    result = tmp_path / "out" / "images" / "a.png"
    before = result.read_bytes()
    (source / "a.png").unlink()
    (source / "a.png").symlink_to(result)
    (source / "b.png").rename(tmp_path / "b.png")
    (source / "b.png").symlink_to(tmp_path / "b.png")  # a link to anything else is as good as a file
    for part in (tmp_path / "out" / "manifest").iterdir():
        part.unlink()
    rows = work(plan(tmp_path))
    assert {name: row["error_class"] for name, row in rows.items()} == {"a.png": "own_result", "b.png": None}
    assert result.read_bytes() == before


def test_a_result_whose_name_is_too_long_for_the_file_system_is_told_as_that(tmp_path: Path) -> None:
    name = "n" * 250 + ".bmp"
    marked(tmp_path / "src" / name, red(Degradation.RAIN))
    row = work(plan(tmp_path, output_format="png"))[name]
    assert (row["status"], row["stage"], row["error_class"]) == ("failed", "write", "name_too_long")
    assert f"{name}.png" in row["error_message"]


def test_batches_are_of_one_padded_shape_and_within_the_limit(tmp_path: Path) -> None:
    for number in range(5):
        marked(tmp_path / "src" / f"a{number}.png", red(Degradation.HAZE), height=15 + number % 2, width=20)
    marked(tmp_path / "src" / "b.png", red(Degradation.NOISE), height=40)
    restorer = Brightener(limit=3)
    rows = work(plan(tmp_path), restorer)
    assert sorted(len(batch) for batch in restorer.batches) == [1, 2, 3]
    assert all({(-(-h // 8), -(-w // 8)) for h, w, _ in batch} in ({(2, 3)}, {(5, 2)}) for batch in restorer.batches)
    assert sorted(row["batch_size"] for row in rows.values()) == [1, 2, 2, 3, 3, 3]


def test_full_memory_halves_the_batch(tmp_path: Path) -> None:
    rainy(tmp_path, 4)
    rows = work(plan(tmp_path), Brightener(limit=4, memory=1))
    assert {row["status"] for row in rows.values()} == {"restored"}
    assert {row["oom_retries"] for row in rows.values()} == {2}
    assert {row["batch_size"] for row in rows.values()} == {1}


def test_an_image_alone_goes_in_ever_smaller_tiles(tmp_path: Path) -> None:
    marked(tmp_path / "src" / "large.png", red(Degradation.RAIN), height=64, width=40)
    marked(tmp_path / "src" / "small.png", red(Degradation.RAIN))
    rows = work(plan(tmp_path), Brightener(memory_px=20))
    large, small = rows["large.png"], rows["small.png"]
    assert (large["status"], large["tiled"], large["tile_px"], large["oom_retries"]) == ("restored", True, 16, 2)
    assert (small["status"], small["tiled"], small["tile_px"], small["oom_retries"]) == ("restored", False, None, 0)


def test_tiles_that_do_not_fit_together_go_singly_before_smaller_ones(tmp_path: Path) -> None:
    """Several tiles of a prompt's window go through the network at once."""
    marked(tmp_path / "src" / "large.png", red(Degradation.RAIN), height=100, width=90)
    asked: list[int | None] = []

    class Short(Restorer):
        def restore(self, images: Any, prompt_keys: Any, *, tile_px: int | None = None) -> Any:
            asked.append(tile_px)
            if tile_px is None:
                raise MemoryError
            return super().restore(images, prompt_keys, tile_px=tile_px)

    row = work(plan(tmp_path), Short(tiny_network(), orthogonal_bank(), windows_px={"rain": 64}))["large.png"]
    assert (row["status"], row["tile_px"], row["oom_retries"]) == ("restored", 64, 1)
    assert asked == [None, 64]


def test_tiles_below_a_prompts_window_are_warned_of(tmp_path: Path) -> None:
    marked(tmp_path / "src" / "large.png", red(Degradation.RAIN), height=100, width=90)
    restorer = Restorer(tiny_network(), orthogonal_bank(), windows_px={"rain": 64})
    restorer.memory_budget_bytes //= 10**9
    row = work(plan(tmp_path), restorer)["large.png"]
    assert row["tile_px"] < 64
    assert row["warnings"] == [f"restored in tiles of {row['tile_px']} px, whose brightness may differ"]


def test_what_is_of_one_tone_is_left_alone(tmp_path: Path) -> None:
    """A page, or a frame of black: it would be restored to something that is not there."""
    label = Degradation.LOWLIGHT
    (tmp_path / "src").mkdir()
    Image.fromarray(np.full((40, 50, 3), red(label), np.uint8)).save(tmp_path / "src" / "page.png")
    marked(tmp_path / "src" / "picture.png", red(label))
    rows = work(plan(tmp_path))
    assert (rows["picture.png"]["status"], rows["page.png"]["status"]) == ("restored", "abstained")
    assert rows["page.png"]["decision_reason"].endswith("of one tone or of a few flat ones: nothing to restore")


def test_an_image_whose_smallest_tiles_are_too_large_fails(tmp_path: Path) -> None:
    marked(tmp_path / "src" / "large.png", red(Degradation.RAIN), height=64, width=40)
    row = work(plan(tmp_path), Brightener(memory_px=7))["large.png"]
    assert (row["status"], row["error_class"], row["oom_retries"]) == ("failed", "out_of_memory", 3)


@pytest.mark.parametrize(("tile", "haze_px"), [("auto", None), (64, 64)])
def test_tiles_by_a_prompts_window_are_flagged_and_others_are_warned_of(
    tmp_path: Path, tile: Literal["auto"] | int, haze_px: int | None
) -> None:
    for label in (Degradation.RAIN, Degradation.HAZE):
        marked(tmp_path / "src" / f"{label}.png", red(label), height=100, width=90)
    restorer = Restorer(tiny_network(), orthogonal_bank(), tile=tile, windows_px={"rain": 64})
    rows = work(plan(tmp_path), restorer)
    assert (rows["rain.png"]["tile_px"], rows["haze.png"]["tile_px"]) == (64, haze_px)
    assert [row["tiled"] for row in rows.values()] == [row["tile_px"] is not None for row in rows.values()]
    for row in rows.values():
        assert any("in tiles of 64 px" in warning for warning in row["warnings"]) == (tile == 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_without_room_for_an_image_has_it_in_tiles_and_the_run_goes_on(tmp_path: Path) -> None:
    network, side_px = tiny_network(unshuffle_factor=1), 1536
    marked(tmp_path / "src" / "large.png", red(Degradation.RAIN), height=side_px, width=side_px)
    marked(tmp_path / "src" / "small.png", red(Degradation.RAIN))
    restorer = Restorer(network, orthogonal_bank(), device="cuda")
    restorer.memory_budget_bytes = 10**12  # so that its own estimate does not foresee what is to happen
    needed = side_px**2 * bytes_per_pixel(network.config, torch.float32, "cuda")
    gc.collect()
    torch.cuda.empty_cache()  # what other tests left would be room enough
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + needed / 3) / total)
    try:
        rows = work(plan(tmp_path), restorer)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [row["error_message"] for row in rows.values()] == [None, None]
    assert rows["large.png"]["oom_retries"] > 0
    assert rows["large.png"]["tiled"]
    assert any("in tiles of" in warning for warning in rows["large.png"]["warnings"])
    assert not rows["small.png"]["warnings"]
    assert not rows["small.png"]["tiled"]


def test_beside_a_gpu_the_threads_that_read_and_write_look_and_all_comes_to_the_same_end(tmp_path: Path) -> None:
    for number, label in enumerate([*LABELS, *LABELS]):
        marked(tmp_path / "src" / f"{number}.png", red(label))
    marked(tmp_path / "src" / "unsure.png", 200)
    marked(tmp_path / "src" / "fault.png", 210)

    class Named(Reader):
        def __init__(self) -> None:
            self.lookers, self.tellers = set[str](), set[str]()

        def take_views(self, image: NDArray[np.uint8]) -> Views:
            self.lookers.add(threading.current_thread().name.partition("_")[0])
            return super().take_views(image)

        def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
            self.tellers.add(threading.current_thread().name)
            return super().probabilities(views)

    found = []
    for device, expected in (("cpu", {"MainThread"}), ("cuda", {"read", "write"})):
        run = plan_run(tmp_path / "src", tmp_path / device, config_of(label="auto"), per_shard=100)
        reader = Named()
        context = replace(run.context, device=device)
        rows = work(run, worker=Worker(context, restorer=Brightener(), classifier=reader, worker_id="w"))
        assert (reader.lookers, reader.tellers) == (expected, {"MainThread"})
        found.append({name: lasting(row) | {"device": None, "run_id": None} for name, row in rows.items()})
    assert found[0] == found[1]
    assert {row["stage"] for row in found[1].values()} == {None, "classify"}


@pytest.mark.parametrize("fault", ["taking views", "asking"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_second_look_that_fails_fails_no_image(tmp_path: Path, device: str, fault: str) -> None:
    rainy(tmp_path, 3)
    marked(tmp_path / "src" / "other.png", red(Degradation.BLUR))
    rain_brightened = red(Degradation.RAIN) + 10

    class Full(Reader):
        def _one(self, value: int) -> dict[Degradation, float]:
            if value == rain_brightened and fault == "asking":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._one(value)

        def take_views(self, image: NDArray[np.uint8]) -> Views:
            if image[0, 0, 0] == rain_brightened and fault == "taking views":
                raise MemoryError
            return super().take_views(image)

    run = plan(tmp_path)
    context = replace(run.context, device=device)
    rows = work(run, worker=Worker(context, restorer=Brightener(), classifier=Full(), worker_id="w"))
    assert rows.pop("other.png")["clean_probability_after"] == 0.01
    for row in rows.values():
        assert (row["status"], row["label"], row["clean_probability_after"]) == ("restored", "rain", None)
        assert row["warnings"] == ["not looked at again: memory was full"]


class Counting(Reader):
    """Notes about how many images it is asked at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        self.asked.append(len(views))
        return super().probabilities(views)


@pytest.mark.parametrize(("device", "asked"), [("cuda", [8, 16, 32, 4]), ("cpu", [8, 16, 16, 16, 4])])
def test_windows_grow_so_that_the_network_soon_has_something_to_do(
    tmp_path: Path, device: str, asked: list[int]
) -> None:
    rainy(tmp_path, 60)
    run, reader = plan(tmp_path, second_look=False), Counting()
    worker = Worker(replace(run.context, device=device), restorer=Brightener(), classifier=reader, worker_id="w")
    assert len(work(run, worker=worker)) == 60
    assert reader.asked == asked


def test_results_that_are_there_are_looked_at_together(tmp_path: Path) -> None:
    rainy(tmp_path, 20)
    run, reader = plan(tmp_path), Counting()
    worker = Worker(
        replace(run.context, device="cuda"), restorer=Brightener(limit=20), classifier=reader, worker_id="w"
    )
    assert len(work(run, worker=worker)) == 20
    assert sum(reader.asked) == 40
    assert len(reader.asked) <= 5


@pytest.mark.parametrize(("device", "pixels", "most"), [("cpu", 10**6, 16), ("cuda", 10**6, 32), ("cuda", 3 * 256, 3)])
def test_the_network_does_not_get_far_ahead_of_the_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, pixels: int, most: int
) -> None:
    monkeypatch.setattr(worker_module, "WINDOW_PIXELS", pixels)
    rainy(tmp_path, 80)
    restored, ahead = [0], [0]
    written = list[str]()  # appending is atomic, and several threads do

    class Counted(Brightener):
        def restore(self, images: Sequence[NDArray[Any]], *args: Any, **options: Any) -> list[NDArray[Any]]:
            ahead[0] = max(ahead[0], restored[0] - len(written))
            restored[0] += len(images)
            return super().restore(images, *args, **options)

    def slowly(*args: Any, **options: Any) -> None:
        time.sleep(0.003)
        written.append("one")
        write(*args, **options)

    write = worker_module.write
    monkeypatch.setattr(worker_module, "write", slowly)
    run = plan(tmp_path)
    work(
        run, worker=Worker(replace(run.context, device=device), restorer=Counted(), classifier=Reader(), worker_id="w")
    )
    assert 0 < ahead[0] <= most


def test_an_image_too_large_for_memory_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rainy(tmp_path, 4)
    monkeypatch.setenv(FAULT, "exhaust:restore:2.png")
    rows = work(plan(tmp_path))
    assert [rows[f"{number}.png"]["status"] for number in range(4)] == ["restored", "restored", "failed", "restored"]
    assert rows["2.png"]["error_class"] == "out_of_memory"
    assert rows["2.png"]["stage"] == "restore"
    assert rows["2.png"]["output_uri"] is None


def test_references_are_measured_before_and_after(tmp_path: Path) -> None:
    source, references = tmp_path / "src", tmp_path / "ref"
    for name, label in (("rain", Degradation.RAIN), ("clean", Degradation.CLEAN), ("small", Degradation.RAIN)):
        marked(source / f"{name}.png", red(label))
    marked(source / "alone.png", red(Degradation.RAIN))
    marked(source / "fails.png", red(Degradation.RAIN))
    for name in ("rain", "clean", "fails"):
        references.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (138, 138, 138)).save(references / f"{name}.bmp")
    Image.new("RGB", (8, 8)).save(references / "small.bmp")
    run = plan(tmp_path, reference=str(references))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT, "raise:restore:fails.png")
        rows = work(run)
    degraded = np.asarray(Image.open(source / "rain.png"))
    expected = psnr_db(degraded, np.full_like(degraded, 138))
    assert rows["rain.png"]["psnr_input_db"] == pytest.approx(expected)
    assert rows["rain.png"]["psnr_db"] > rows["rain.png"]["psnr_input_db"]
    assert rows["rain.png"]["ssim"] is not None
    assert rows["clean.png"]["psnr_db"] == rows["clean.png"]["psnr_input_db"] is not None
    assert rows["clean.png"]["ssim"] == rows["clean.png"]["ssim_input"] is not None
    assert (rows["fails.png"]["status"], rows["fails.png"]["psnr_db"]) == ("failed", None)
    assert rows["fails.png"]["psnr_input_db"] == pytest.approx(expected)
    assert rows["small.png"]["status"] == "restored"
    assert rows["small.png"]["psnr_db"] is None
    assert any("8 x 8" in warning for warning in rows["small.png"]["warnings"])
    assert rows["alone.png"]["reference_uri"] is None


def test_a_failed_image_has_no_figures_of_a_result(tmp_path: Path) -> None:
    source, references = tmp_path / "src", tmp_path / "ref"
    marked(source / "rain.png", red(Degradation.RAIN))
    references.mkdir()
    Image.new("RGB", (16, 16), (138, 138, 138)).save(references / "rain.png")
    run = plan(tmp_path, reference=str(references))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULT, "raise:before-rename:rain.png")
        row = work(run)["rain.png"]
    assert (row["status"], row["stage"]) == ("failed", "write")
    assert row["psnr_input_db"] is not None
    figures = ("psnr_db", "ssim", "change_rmse_255", "clipped_fraction", "suspicious", "clean_probability_after")
    assert [row[name] for name in figures] == [None] * 6


def test_references_that_cannot_be_listed_cost_the_figures_alone(tmp_path: Path) -> None:
    source, references = tmp_path / "src", tmp_path / "ref"
    marked(source / "deep" / "rain.png", red(Degradation.RAIN))
    references.mkdir()
    (references / "deep").symlink_to("deep")  # a loop
    row = work(plan(tmp_path, reference=str(references)))["deep/rain.png"]
    assert (row["status"], row["psnr_db"]) == ("restored", None)
    assert any("references cannot be listed" in warning for warning in row["warnings"])


def test_what_reading_and_writing_gave_up_is_in_the_row(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    frames = [
        Image.fromarray(np.full((32, 32, 4), (red(Degradation.RAIN), 0, 0, 99 + 9 * i), np.uint8)) for i in (0, 1)
    ]
    for frame in frames:
        for column in range(1, 32, 2):  # what is flat is left alone
            frame.paste((255, 255, 255, 255), (column, 0, column + 1, 32))
    frames[0].save(tmp_path / "src" / "a.tif", save_all=True, append_images=frames[1:])
    row = work(plan(tmp_path, output_format="jpeg"))["a.tif"]
    assert row["warnings"] == ["first of 2 frames", "JPEG has no alpha: composed over white"]


def test_a_file_that_changed_since_the_plan_is_done_with_a_warning(tmp_path: Path) -> None:
    marked(tmp_path / "src" / "a.png", red(Degradation.RAIN))
    run = plan(tmp_path)
    marked(tmp_path / "src" / "a.png", red(Degradation.RAIN), height=64, width=48)
    row = work(run)["a.png"]
    assert row["status"] == "restored"
    assert any("changed after it was planned" in warning for warning in row["warnings"])
    assert (row["height"], row["output_height"]) == (64, 64)


def test_a_forced_label_asks_no_classifier(tmp_path: Path) -> None:
    write_pictures(tmp_path / "src", ["a.png"])
    run = plan(tmp_path, label="noise")
    restorer = Brightener()
    row = work(run, worker=Worker(run.context, restorer=restorer, classifier=None, worker_id="w"))["a.png"]
    assert (row["label"], row["label_source"], row["classifier"]) == ("noise", "forced", None)
    assert row["noise_sigma_255"] > 0
    assert restorer.prompts_seen == [row["prompt"]]


def test_a_given_sigma_overrules_the_estimate(tmp_path: Path) -> None:
    write_pictures(tmp_path / "src", ["a.png"])
    row = work(plan(tmp_path, label="noise", noise_sigma_255=50.0))["a.png"]
    assert row["prompt"] == "noise50"


@pytest.mark.parametrize(("clean", "files"), [("copy", ["a.png"]), ("link", ["a.png"]), ("skip", [])])
def test_clean_images_are_copied_linked_or_skipped(tmp_path: Path, clean: str, files: list[str]) -> None:
    marked(tmp_path / "src" / "a.png", red(Degradation.CLEAN))
    row = work(plan(tmp_path, clean=clean))["a.png"]
    images = tmp_path / "out" / "images"
    assert row["status"] == "copied"
    assert [path.name for path in images.iterdir()] == files
    assert (row["output_uri"] is None) == (clean == "skip")
    if clean == "link":
        assert (images / "a.png").samefile(tmp_path / "src" / "a.png")


def test_sixteen_bit_greyscale_stays_so(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    pixels = np.full((16, 16), 128 * 257, np.uint16)
    pixels[:, 1::2] = 127 * 257  # else it were flat
    pixels[0, 0] = red(Degradation.RAIN) * 257
    Image.fromarray(pixels).save(tmp_path / "src" / "deep.png")
    row = work(plan(tmp_path))["deep.png"]
    with Image.open(tmp_path / "out" / "images" / "deep.png") as image:
        result = np.asarray(image).astype(np.uint16)
    assert row["status"] == "restored"
    assert (result == pixels + 2570).all()
    assert row["change_rmse_255"] == pytest.approx(float(to_uint8(result)[5, 4]) - 128)


@pytest.mark.parametrize(("mode", "level"), [("L", 133), ("RGB", (133, 133, 133))])
def test_a_grey_picture_gets_no_colour_however_it_is_stored(tmp_path: Path, mode: str, level: Any) -> None:
    class Tinter(Brightener):
        def restore(self, *arguments: Any, **options: Any) -> list[NDArray[Any]]:
            tint = np.array([9, 0, 0], np.uint8)
            return [image + tint for image in super().restore(*arguments, **options)]

    for folder, grey in (("src", 120), ("references", 140)):
        (tmp_path / folder).mkdir()
        Image.new("L", (16, 16), grey).convert(mode).save(tmp_path / folder / "a.png")
    run = plan(tmp_path, label="rain", reference=str(tmp_path / "references"))
    row = work(run, worker=Worker(run.context, restorer=Tinter(), classifier=None, worker_id="w"))["a.png"]
    with Image.open(tmp_path / "out" / "images" / "a.png") as image:
        assert (image.mode, image.getpixel((0, 0))) == (mode, level)
    assert row["change_rmse_255"] == pytest.approx(13)
    assert row["psnr_db"] == pytest.approx(20 * np.log10(255 / 7))


def test_what_alpha_hides_sways_nothing_and_stays(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 4), (red(Degradation.CLEAN), 250, 0, 0), np.uint8)
    pixels[8:, 4:12] = red(Degradation.RAIN), 60, 70, 255
    pixels[8:, 4, 1] = 100  # not of one tone
    pixels[8:, 4, 3] = 9
    (tmp_path / "src").mkdir()
    Image.fromarray(pixels).save(tmp_path / "src" / "cut.png")
    row = work(plan(tmp_path))["cut.png"]
    assert (row["status"], row["label"]) == ("restored", "rain")
    assert row["change_rmse_255"] == pytest.approx(10)
    with Image.open(tmp_path / "out" / "images" / "cut.png") as image:
        result = np.asarray(image)
    pixels[8:, 4:12, :3] += 10
    assert np.array_equal(result, pixels)


def test_what_alpha_hides_is_not_measured_against_what_a_reference_shows_there(tmp_path: Path) -> None:
    for folder in ("src", "ref"):
        (tmp_path / folder).mkdir()
    clean = np.full((16, 16, 3), (60, 70, 80), np.uint8)
    clean[:, :6] = 200
    noisy = np.dstack([clean + np.uint8(20), np.full((16, 16), 255, np.uint8)])
    noisy[:, :6] = 0  # hidden
    Image.fromarray(noisy).save(tmp_path / "src" / "cut.png")
    Image.fromarray(clean).save(tmp_path / "ref" / "cut.png")
    row = work(plan(tmp_path, label="rain", reference=str(tmp_path / "ref")))["cut.png"]
    assert row["psnr_input_db"] == pytest.approx(20 * np.log10(255 / 20))
    assert row["psnr_db"] == pytest.approx(20 * np.log10(255 / 30))


def test_rows_that_are_committed_are_not_done_again(tmp_path: Path) -> None:
    rainy(tmp_path, 4)
    run = plan(tmp_path)
    worker = Worker(run.context, restorer=Brightener(), classifier=Reader(), worker_id="w")
    (shard,) = run.shards
    worker(Shard(shard.shard_id, shard.images[:2]), attempt=1, on_outcomes=lambda rows: None)
    first = rows_of(run)
    reported: list[str] = []
    worker(shard, attempt=1, on_outcomes=lambda rows: reported.extend(row.relative_path for row in rows))
    assert sorted(reported) == ["2.png", "3.png"]
    again = rows_of(run)
    assert len(again) == 4
    assert {name: again[name] for name in first} == first


def test_an_image_that_is_set_aside_has_its_row_before_that_is_told(tmp_path: Path) -> None:
    """Being told may end the run at once, and who is not told has every later call set the image aside untried."""
    rainy(tmp_path, 3)
    run = plan(tmp_path)
    (shard,) = run.shards
    run.directory.create()
    for _ in range(2):
        Journal(run.directory.journal_dir, shard.shard_id).begin(shard.images[1].image_id)
        Journal(run.directory.journal_dir, shard.shard_id).count_death()

    def end(rows: list[Outcome]) -> None:
        if rows[0].status is Status.QUARANTINED:
            assert rows_of(run)["1.png"]["status"] == Status.QUARANTINED
            raise KeyboardInterrupt

    worker = Worker(run.context, restorer=Brightener(), classifier=Reader(), worker_id="w")
    with pytest.raises(KeyboardInterrupt):
        worker(shard, attempt=2, on_outcomes=end)
    assert sorted(rows_of(run)) == ["0.png", "1.png", "2.png"]


def test_rows_are_committed_as_time_goes_on(tmp_path: Path) -> None:
    rainy(tmp_path, 3)
    run = plan(tmp_path)
    object.__setattr__(run.context, "commit_every_s", 0.0)
    work(run)
    assert len(run.directory.parts()) == 3


def test_after_stop_what_is_done_is_committed_and_the_rest_left(tmp_path: Path) -> None:
    rainy(tmp_path, 40)
    run = plan(tmp_path)
    worker = Worker(run.context, restorer=Brightener(), classifier=Reader(), worker_id="w")
    reported: list[Outcome] = []

    def stop_at_first(rows: list[Outcome]) -> None:
        reported.extend(rows)
        worker.stop()

    (shard,) = run.shards
    worker(shard, attempt=1, on_outcomes=stop_at_first)
    assert 0 < len(reported) < 40
    assert set(done(run.directory.root)["image_id"].to_pylist()) == {row.image_id for row in reported}
    fresh = work(run)
    assert len(fresh) == 40


def test_a_careful_attempt_gives_the_same_rows_one_at_a_time(tmp_path: Path) -> None:
    rainy(tmp_path, 3)
    restorer = Brightener()
    rows = work(plan(tmp_path), restorer, attempt=2)
    assert [len(batch) for batch in restorer.batches] == [1, 1, 1]
    assert {row["status"] for row in rows.values()} == {"restored"}
    assert {row["attempt"] for row in rows.values()} == {2}


def test_a_failing_manifest_is_an_error_of_the_shard_and_no_image_is_blamed(tmp_path: Path) -> None:
    marked(tmp_path / "src" / "a.png", red(Degradation.RAIN))
    run = plan(tmp_path)
    run.directory.manifest_dir.rmdir()
    run.directory.manifest_dir.write_bytes(b"")
    worker = Worker(run.context, restorer=Brightener(), classifier=Reader(), worker_id="w")
    with pytest.raises(OSError, match="manifest"):
        worker(run.shards[0], attempt=2, on_outcomes=lambda rows: None)
    assert not Journal(run.directory.journal_dir, run.shards[0].shard_id).has_in_flight


def test_no_row_is_committed_twice_where_a_part_is_there_although_an_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rainy(tmp_path, 3)
    run = plan(tmp_path)
    object.__setattr__(run.context, "commit_every_s", 0.0)
    sync_folder, folders = sink.sync_folder, [run.directory.manifest_dir]

    def sync(folder: Path) -> None:
        if folder in folders:
            folders.remove(folder)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync_folder(folder)

    monkeypatch.setattr(sink, "sync_folder", sync)
    with pytest.raises(OSError, match="Input/output error"):
        work(run)
    work(run, attempt=2)
    check_complete(run)


def test_two_workers_never_have_one_shard(tmp_path: Path) -> None:
    rainy(tmp_path, 6)
    run = plan(tmp_path)
    seen: list[str] = []
    workers = [
        threading.Thread(
            target=Worker(run.context, restorer=Brightener(), classifier=Reader(), worker_id=name),
            args=(run.shards[0],),
            kwargs={"attempt": 1, "on_outcomes": lambda rows: seen.extend(row.image_id for row in rows)},
        )
        for name in ("w1", "w2")
    ]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert len(seen) == len(set(seen)) == 6


def test_label_auto_without_a_classifier_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "src", ["a.png"])
    with pytest.raises(ValueError, match="classifier"):
        Worker(plan(tmp_path).context, restorer=Brightener(), classifier=None, worker_id="w")


@pytest.mark.parametrize(("device", "cpus", "threads"), [("cpu", 16, 2), ("cuda", 1, 2), ("cuda", 4, 4)])
def test_codecs_use_the_cpus_that_a_gpu_leaves_idle(device: str, cpus: int, threads: int) -> None:
    assert codec_threads(device, cpus) == threads


def test_a_full_disk_fails_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rainy(tmp_path, 3)
    run = plan(tmp_path)
    monkeypatch.setenv(FAULT, "fill:before-rename:1.png")
    with pytest.raises(OSError, match="No space left"):
        work(run)
    assert "failed" not in {row["status"] for row in rows_of(run).values()}
    monkeypatch.delenv(FAULT)
    assert {row["status"] for row in work(run, attempt=2).values()} == {"restored"}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.EMFILE, errno.ENOMEM])
def test_a_folder_of_results_that_is_closed_fails_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    marked(tmp_path / "src" / "a.png", red(Degradation.RAIN))
    run = plan(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as refusing:
        refusing.setattr(RunDirectory, "write_image", refuse)
        with pytest.raises(OSError, match=os.strerror(code)):
            work(run)
    assert {row["status"] for row in work(run, attempt=2).values()} == {"restored"}


def test_a_folder_of_results_that_is_moved_fails_no_image_and_stays_where_it_is(tmp_path: Path) -> None:
    rainy(tmp_path, 3)
    run = plan(tmp_path)
    root = run.directory.root
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(OtherRunError, match="cannot be read"):
        work(run)
    assert not root.exists()
    moved.rename(root)
    assert {row["status"] for row in work(run).values()} == {"restored"}


def test_failures_that_may_be_the_machines_are_no_rows_until_one_image_is_done_or_another_machine_says_so(
    tmp_path: Path,
) -> None:
    rainy(tmp_path, 3)
    run = plan(tmp_path)
    worker = Worker(run.context, restorer=Brightener(memory=0), classifier=Reader(), worker_id="w")
    reported: list[Outcome] = []
    with pytest.raises(DoubtfulShardError, match="3 images failed, the last one with: memory ran out"):
        worker(run.shards[0], attempt=1, on_outcomes=reported.extend, is_final=False)
    assert reported == []
    assert rows_of(run) == {}
    worker(run.shards[0], attempt=1, on_outcomes=reported.extend)
    assert [row["error_class"] for row in rows_of(run).values()] == ["out_of_memory"] * 3


def test_what_a_machine_may_not_read_is_no_row_until_another_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rainy(tmp_path, 2)
    run = plan(tmp_path)

    def refuse(ref: ImageRef) -> bytes:
        raise ImageFault(Stage.FETCH, "permission_denied", "no right to read this file")

    monkeypatch.setattr(stages_module, "fetch", refuse)
    worker = Worker(run.context, restorer=Brightener(), classifier=Reader(), worker_id="w")
    with pytest.raises(DoubtfulShardError, match="2 images failed, the last one with: no right to read this file"):
        worker(run.shards[0], attempt=1, on_outcomes=lambda rows: None, is_final=False)
    assert rows_of(run) == {}


def test_a_failure_beside_successes_that_may_be_the_machines_is_looked_at_again_alone(tmp_path: Path) -> None:
    rainy(tmp_path, 3)
    (tmp_path / "src" / "gone.png").symlink_to("nothing")  # as the submitting machine sees it, too
    run = plan(tmp_path)
    (tmp_path / "src" / "0.png").unlink()
    worker = Worker(run.context, restorer=Brightener(), classifier=Reader(), worker_id="w")
    reported: list[Outcome] = []
    with pytest.raises(DoubtfulShardError, match="1 images failed, the last one with: the file is not there"):
        worker(run.shards[0], attempt=1, on_outcomes=reported.extend, is_final=False)
    statuses = {"1.png": "restored", "2.png": "restored", "gone.png": "failed"}
    assert {outcome.relative_path: outcome.status for outcome in reported} == statuses
    assert {name: row["status"] for name, row in rows_of(run).items()} == statuses
    worker(run.shards[0], attempt=1, on_outcomes=reported.extend)
    assert reported[3:] == [outcome for outcome in reported if outcome.relative_path == "0.png"]
    assert {name: row["status"] for name, row in rows_of(run).items()} == {"0.png": "failed"} | statuses


def test_a_folder_that_is_deleted_fails_alone_when_it_is_looked_at_again(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png"):
        marked(tmp_path / "src" / name, red(Degradation.RAIN))
    run = plan(tmp_path)
    (tmp_path / "src" / "b" / "1.png").unlink()
    worker = Worker(run.context, restorer=Brightener(), classifier=Reader(), worker_id="w")
    with pytest.raises(DoubtfulShardError):
        worker(run.shards[0], attempt=1, on_outcomes=lambda rows: None, is_final=False)
    worker(run.shards[0], attempt=1, on_outcomes=lambda rows: None)
    assert {name: row["status"] for name, row in rows_of(run).items()} == {"a/0.png": "restored", "b/1.png": "failed"}


def test_the_time_of_a_batch_is_shared_out_among_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class SlowReader(Reader):
        def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
            clock[0] += 3.0
            return super().probabilities(views)

    class SlowBrightener(Brightener):
        def restore(self, *arguments: Any, **options: Any) -> list[NDArray[Any]]:
            clock[0] += 5.0
            return super().restore(*arguments, **options)

    for module in (item_module, judge_module, restoring_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    rainy(tmp_path, 4)
    run = plan(tmp_path, second_look=False)
    restorer = SlowBrightener()
    rows = work(run, worker=Worker(run.context, restorer=restorer, classifier=SlowReader(), worker_id="w"))
    assert [len(batch) for batch in restorer.batches] == [4]
    assert [row["classify_ms"] for row in rows.values()] == [750.0] * 4
    assert [row["restore_ms"] for row in rows.values()] == [1250.0] * 4


def test_a_source_that_is_gone_as_a_whole_fails_no_image(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for number in range(3):
        marked(source / f"{number}.png", red(Degradation.RAIN))
    run = plan(tmp_path)
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(SourceGoneError, match="cannot be reached"):
        work(run)
    source.mkdir()  # what an unmounted folder leaves
    with pytest.raises(SourceGoneError, match="or is empty"):
        work(run, attempt=2)
    assert rows_of(run) == {}
    source.rmdir()
    (tmp_path / "elsewhere").rename(source)
    assert {row["status"] for row in work(run).values()} == {"restored"}


def test_what_is_done_when_the_source_goes_has_its_rows(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for number in range(40):  # more than are read ahead
        marked(source / f"{number:02}.png", red(Degradation.RAIN))
    run = plan(tmp_path)

    class Unplugged(Brightener):
        def restore(self, *arguments: Any, **options: Any) -> list[NDArray[Any]]:
            if source.exists():
                source.rename(tmp_path / "elsewhere")
            return super().restore(*arguments, **options)

    with pytest.raises(SourceGoneError):
        work(run, Unplugged())
    written = {path.name for path in run.directory.images_dir.iterdir()}
    assert {name for name, row in rows_of(run).items() if row["status"] == "restored"} == written != set()


def listed(tmp_path: Path, names: Sequence[str]) -> TinyRun:
    """A planned run over a list of photographs in a folder beside it, `volume`."""
    for name in names:
        marked(tmp_path / "volume" / name, red(Degradation.RAIN))
    source = tmp_path / "list.txt"
    source.write_text("".join(f"volume/{name}\n" for name in names))
    return plan_run(source, tmp_path / "out", config_of(label="auto"), per_shard=len(names))


def test_a_worker_that_does_not_see_the_files_of_a_list_fails_no_image(tmp_path: Path) -> None:
    run = listed(tmp_path, ["0.png", "1.png", "2.png"])
    (tmp_path / "volume").rename(tmp_path / "elsewhere")
    with pytest.raises(SourceGoneError, match=r"the folder of volume/\d\.png"):
        work(run)
    (tmp_path / "volume").mkdir()
    with pytest.raises(SourceGoneError, match="or is empty"):
        work(run, attempt=2)
    assert rows_of(run) == {}


def test_a_volume_below_the_source_that_is_gone_fails_no_image(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png", "b/2.png"):
        marked(tmp_path / "src" / name, red(Degradation.RAIN))
    run = plan_run(tmp_path / "src", tmp_path / "out", config_of(label="auto"), per_shard=1)
    for name in ("1.png", "2.png"):
        (tmp_path / "src" / "b" / name).unlink()
    with pytest.raises(SourceGoneError, match=r"folder of b/1\.png"):
        work(run)
    assert set(rows_of(run)) == {"a/0.png"}


def test_photographs_that_are_deleted_fail_alone(tmp_path: Path) -> None:
    run = listed(tmp_path, ["alone/0.png", "1.png", "2.png"])
    (tmp_path / "volume" / "alone" / "0.png").unlink()
    (tmp_path / "volume" / "1.png").unlink()
    rows = work(run)
    found = {name: (row["status"], row["error_class"]) for name, row in rows.items()}
    gone = ("failed", "missing")
    assert found == {"volume/alone/0.png": gone, "volume/1.png": gone, "volume/2.png": ("restored", None)}


def test_photographs_that_had_gone_before_the_call_fail(tmp_path: Path) -> None:
    run = listed(tmp_path, ["0.png", "1.png"])
    shards = tuple(replace(s, images=tuple(replace(ref, modified=None) for ref in s.images)) for s in run.shards)
    (tmp_path / "volume").rename(tmp_path / "elsewhere")
    assert {row["error_class"] for row in work(replace(run, shards=shards)).values()} == {"missing"}


def test_a_lost_gpu_fails_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rainy(tmp_path, 3)
    run, restorer = plan(tmp_path), Brightener()

    def lost(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(restorer, "restore", lost)
    with pytest.raises(torch.AcceleratorError):
        work(run, restorer)
    assert rows_of(run) == {}


def test_names_that_are_not_text_can_be_told_of(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    marked(tmp_path / "src" / os.fsdecode(b"caf\xe9.png"), red(Degradation.CLEAN))
    run = plan(tmp_path, clean="link")
    run.directory.image_path("caf%E9.png").mkdir()
    (row,) = work(run).values()
    assert (row["status"], row["stage"]) == ("failed", "write")
    assert "%E9" in row["error_message"]


@pytest.mark.parametrize("clean", ["copy", "link"])
def test_clean_images_in_folders_are_kept_there(tmp_path: Path, clean: str) -> None:
    marked(tmp_path / "src" / "deep" / "er" / "a.png", red(Degradation.CLEAN))
    assert work(plan(tmp_path, clean=clean))["deep/er/a.png"]["status"] == "copied"
    assert (tmp_path / "out" / "images" / "deep" / "er" / "a.png").is_file()


@pytest.mark.parametrize("label", [Degradation.CLEAN, Degradation.RAIN])
def test_rows_are_stored_as_the_sources_are_though_it_is_seen_upright(tmp_path: Path, label: Degradation) -> None:
    """Boxes that somebody has drawn on the stored rows hold for what is kept and for what is restored."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    pixels = np.random.default_rng(0).integers(100, 156, (16, 24, 3), np.uint8)
    pixels[-1, 0] = red(label)  # upright, the top left pixel
    path = tmp_path / "src" / "a.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path, exif=exif)
    row = work(plan(tmp_path))["a.png"]
    assert row["status"] == ("copied" if label is Degradation.CLEAN else "restored")
    assert (row["width"], row["height"]) == (16, 24)
    assert (row["output_width"], row["output_height"]) == (24, 16)
    with Image.open(tmp_path / "out" / "images" / "a.png") as written:
        assert (written.size, written.getexif()[0x0112]) == ((24, 16), 6)


def test_large_images_are_read_ahead_one_for_each_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = [ImageRef(str(number), f"{number}.png", f"file:///{number}.png", 1, None) for number in range(12)]
    monkeypatch.setattr("pipeline.worker.WINDOW_PIXELS", 150)
    begun: list[str] = []

    def loading(ref: ImageRef) -> Item:
        begun.append(ref.image_id)
        item = Item(ref, {})
        item.image = SimpleNamespace(width=10, height=10)  # type: ignore[assignment]
        return item

    handed_out = []
    with ReadAhead(refs, loading, threads=2, most=16) as ahead:
        while not ahead.is_empty:
            time.sleep(0.02)  # as long as the network is busy, the readers could go on
            assert len(begun) <= len(handed_out) + 3  # two make the limit, one more was under way
            handed_out.append(ahead.next().ref.image_id)
    assert handed_out == [ref.image_id for ref in refs]
