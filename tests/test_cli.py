import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import SRGB
from PIL import Image
from skimage import data
from synthetic_classifier import write_tiny_classifier
from synthetic_weights import TINY, write_tiny_model
from typer.testing import CliRunner

from jobs import networks
from jobs.cli import app
from jobs.config import RestoreOptions
from jobs.display import _duration
from jobs.errors import UsageError
from jobs.local import LocalRunner
from jobs.networks import worker_seconds
from jobs.places import sole_driver
from jobs.restore import _absolute, prepare
from jobs.runner import WHOLE_PIXELS
from jobs.sheets import CAPTION_PX, GAP_PX
from jobs.text import harmless
from models import orthogonal_bank
from models.dfpir import DFPIR
from models.graphs import Forward, Recorded
from models.memory import bytes_needed
from models.weights import load_checkpoint, save_checkpoint
from pipeline.faults import FAULT
from pipeline.sink import RunDirectory, read_manifest
from pipeline.source import local_path

pytestmark = pytest.mark.usefixtures("in_this_process")
runner = CliRunner()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("weights")
    model, classifier = write_tiny_model(folder / "model.safetensors"), write_tiny_classifier(folder / "c.safetensors")
    return ["--model", str(model), "--classifier", str(classifier), "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    (folder / "holiday").mkdir(parents=True)
    Image.fromarray(data.astronaut()[:72, :90]).save(folder / "astronaut.png")
    Image.fromarray(data.coffee()[:80, :64]).save(folder / "holiday" / "coffee.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def restore(src: Path, out: Path, weights: list[str], *more: object) -> tuple[int, str, str]:
    return invoke("restore", src, out, *weights, "--engine", "local", *more)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_is_prepared_without_the_library_of_the_classifiers_network(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    """Importing it takes seconds, which only workers need."""
    code = (
        "import sys; from pathlib import Path; from jobs.config import RestoreOptions; "
        "from jobs.restore import prepare; src, out, model, classifier = sys.argv[1:]; "
        "options = RestoreOptions(model=model, classifier=classifier); "
        "assert prepare(Path(src), Path(out), options).planned == 2; assert 'timm' not in sys.modules; "
        "import os; os._exit(0)"  # see `jobs.cli.main`
    )
    command = [sys.executable, "-c", code, str(photographs), str(tmp_path / "out"), weights[1], weights[3]]
    subprocess.run(command, check=True)


@pytest.mark.usefixtures("child_processes")
def test_sigterm_after_the_last_image_is_told_and_the_same_command_sums_up(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("jobs.restore.summarise", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        code, _, stderr = restore(photographs, out, weights)
    assert code == 128 + signal.SIGTERM
    assert "dfpir: ended by SIGTERM; the same command goes on from here" in stderr
    assert not (out / "summary.json").exists()
    assert restore(photographs, out, weights)[0] == 0
    assert (out / "summary.json").exists()


def test_results_are_not_left_in_the_working_directory_of_a_ray_job(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    code, _, stderr = restore(photographs, Path("OUT"), weights)
    assert code == 2
    assert "OUT lies in a folder that Ray removes after the job; give absolute paths" in stderr
    assert list(job.iterdir()) == []


def test_what_had_gone_before_the_call_is_told_from_what_a_worker_does_not_see(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    options = RestoreOptions(model=weights[1], classifier=weights[3])
    planned = prepare(photographs, tmp_path / "out", options)
    gone = next(image for shard in planned.left for image in shard.images)
    local_path(gone.uri).unlink()
    left = prepare(photographs, tmp_path / "out", options).left
    unseen = [image.image_id for shard in left for image in shard.images if image.modified is None]
    assert unseen == [gone.image_id]
    assert left.image_count == planned.left.image_count


def test_workers_that_share_a_gpu_have_memory_for_large_photographs(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    options = RestoreOptions(model=weights[1], classifier=weights[3], dtype="bfloat16", device="cpu")
    context = prepare(photographs, tmp_path / "out", options).context
    network = load_checkpoint(Path(weights[1])).network.config
    assert context.least_gpu_bytes == bytes_needed(WHOLE_PIXELS, network, torch.bfloat16, "cuda")


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_a_run_goes_on_in_the_precision_that_it_was_begun_in_wherever_that_was(
    photographs: Path, tmp_path: Path, weights: list[str], first: str
) -> None:
    options = RestoreOptions(model=weights[1], classifier=weights[3], dtype=first, device="cpu")  # type: ignore[arg-type]
    by_itself = options.model_copy(update={"dtype": "auto"})
    begun = prepare(photographs, tmp_path / "out", options)
    begun.directory.create()
    (begun.directory.images_dir / "a result").touch()
    assert prepare(photographs, tmp_path / "out", by_itself).context.config == begun.context.config
    other = {"float32": "bfloat16", "bfloat16": "float32"}[first]
    with pytest.raises(UsageError, match=f"dtype: was '{first}', is now '{other}'"):
        prepare(photographs, tmp_path / "out", options.model_copy(update={"dtype": other}))


def test_what_a_killed_calls_worker_still_commits_counts_against_other_options(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RestoreOptions(model=weights[1], classifier=weights[3], dtype="float32", device="cpu")
    prepare(photographs, tmp_path / "out", options)
    other = options.model_copy(update={"quality": 77})

    def commit(directory: RunDirectory) -> None:
        directory.create()
        directory.write_image("grey.png", b"a late result")

    monkeypatch.setattr(RunDirectory, "await_workers", commit)
    with pytest.raises(UsageError, match="quality: was 95, is now 77"):
        prepare(photographs, tmp_path / "out", other)


@pytest.mark.skipif(sys.platform != "linux", reason="registers what aborts by glibc's name")
@pytest.mark.parametrize(("option", "code"), [("--version", 0), ("--nonsense", 2)])
def test_a_library_that_aborts_at_the_end_changes_no_exit_code(option: str, code: int) -> None:
    aborts = "libc = ctypes.CDLL(None); libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)"
    script = f"import atexit, ctypes; {aborts}; atexit.register(print, 'the end'); from jobs.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, option], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.endswith("the end\n")


def test_a_ctrl_c_that_comes_when_all_is_done_is_no_traceback() -> None:
    late = "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    script = f"import atexit, os, signal; {late}; from jobs.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("child_processes")
def test_a_folder_is_restored_and_its_summary_is_one_json_object(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    before = tree(photographs)
    out = tmp_path / "out"
    code, stdout, stderr = restore(
        photographs, out, weights, "--label", "noise:25", "--reference", photographs, "--json"
    )
    assert code == 0, stderr
    summary = json.loads(stdout)
    assert {
        "counts", "labels", "images_per_s", "megapixels_per_s", "psnr_input_db", "psnr_db", "ssim_input", "ssim",
        "manifest",
    } <= summary.keys()  # fmt: skip
    assert summary["counts"] == {"restored": 2, "copied": 0, "abstained": 0, "failed": 0, "quarantined": 0}
    assert summary["psnr_input_db"] == 100.0
    assert summary["psnr_db"] < 100.0
    rows = read_manifest(out).to_pylist()
    assert {row["prompt"] for row in rows} == {"noise25"}
    assert sorted(str(p.relative_to(out / "images")) for p in (out / "images").rglob("*.*")) == [
        "astronaut.png", "holiday/coffee.jpg",
    ]  # fmt: skip
    assert json.loads((out / "summary.json").read_text())["counts"] == summary["counts"]
    assert tree(photographs) == before


def test_rates_are_of_the_work_and_not_of_reading_the_manifest_afterwards(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def read_slowly(*arguments: Any, **more: Any) -> Any:
        nonlocal now
        now += 60.0
        return read_manifest(*arguments, **more)

    monkeypatch.setattr("jobs.restore.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr("jobs.restore.read_manifest", read_slowly)
    code, stdout, stderr = restore(photographs, tmp_path / "out", weights, "--label", "rain", "--json")
    assert (code, json.loads(stdout)["elapsed_s"]) == (0, 0.0), stderr


def test_a_list_of_photographs_is_restored_as_a_folder_is(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    listed = photographs / "some.txt"
    listed.write_text("holiday/coffee.jpg\nnot-there.png\n")
    out = tmp_path / "out"
    code, stdout, stderr = restore(listed, out, weights, "--label", "rain", "--max-failed-fraction", "0.5", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["counts"] == {
        "restored": 1, "copied": 0, "abstained": 0, "failed": 1, "quarantined": 0,
    }  # fmt: skip
    assert (out / "images/holiday/coffee.jpg").exists()
    again, stdout, stderr = restore(listed, out, weights, "--label", "rain", "--json")
    assert (again, json.loads(stdout)["done_before"]) == (1, 2)


def test_the_same_command_again_does_nothing_twice_and_new_files_are_added(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    out = tmp_path / "out"
    restore(photographs, out, weights, "--label", "rain")
    first = {row["image_id"]: row for row in read_manifest(out).to_pylist()}
    Image.fromarray(data.chelsea()[:64, :64]).save(photographs / "cat.png")
    code, stdout, _ = restore(photographs, out, weights, "--label", "rain", "--json")
    second = {row["image_id"]: row for row in read_manifest(out).to_pylist()}
    assert code == 0
    assert len(second) == 3
    assert {key: second[key] for key in first} == first
    assert json.loads(stdout)["done_before"] == 2
    written = tree(out / "manifest")
    code, stdout, _ = restore(photographs, out, weights, "--label", "rain")
    assert (code, tree(out / "manifest")) == (0, written)
    assert "nothing was left to do" in stdout
    assert "0.00 images/s" not in stdout


def test_another_configuration_is_refused_naming_the_fields(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    out = tmp_path / "out"
    assert restore(photographs, out, weights, "--label", "rain")[0] == 0
    before = tree(out)
    code, _, stderr = restore(photographs, out, weights, "--label", "haze", "--quality", "80", "--format", "png")
    assert code == 2
    assert "label: was 'rain', is now 'haze'" in stderr
    assert "quality: was 95, is now 80" in stderr
    assert "\n  format: was 'same', is now 'png'" in stderr
    after = tree(out)
    assert after == before


def test_a_run_of_a_version_that_computes_otherwise_is_not_said_to_differ_in_options(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    out = tmp_path / "out"
    assert restore(photographs, out, weights, "--label", "rain")[0] == 0
    job = json.loads((out / "job.json").read_text())
    job["config"]["algorithm_version"] = 1
    (out / "job.json").write_text(json.dumps(job))
    code, _, stderr = restore(photographs, out, weights, "--label", "rain")
    assert code == 2
    assert "algorithm_version: was 1, is now" in stderr
    assert "the options and the version of dfpir of the first call" in stderr


def test_bad_images_become_failed_rows_and_decide_the_exit_code(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    (photographs / "empty.png").write_bytes(b"")
    (photographs / "cut.png").write_bytes((photographs / "astronaut.png").read_bytes()[:3000])
    (photographs / "words.jpg").write_text("these are words")
    command = (photographs, tmp_path / "out", weights, "--label", "blur", "--max-pixels-is-not-an-option")
    assert restore(*command)[0] == 2
    code, stdout, stderr = restore(photographs, tmp_path / "out", weights, "--label", "blur")
    assert code == 1
    assert "3 of 5 images failed, more than --max-failed-fraction 0.05 allows" in stderr
    assert "2 restored, 3 failed" in stdout
    rows = {row["relative_path"]: row for row in read_manifest(tmp_path / "out").to_pylist()}
    assert rows["empty.png"]["error_class"] == "empty_file"
    assert all(rows[name]["error_message"] for name in ("empty.png", "cut.png", "words.jpg"))
    again = restore(photographs, tmp_path / "out", weights, "--label", "blur", "--max-failed-fraction", "0.6")
    assert again[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["SRC/none", "OUT"], "none"),
        (["SRC", "SRC/out"], "inside SRC"),
        (["SRC/holiday", "SRC"], "inside OUT"),
        (["SRC", "SRC"], "SRC itself"),
        (["SRC", "DANGLING"], "a link to nothing"),
        (["EMPTY", "OUT"], "no "),
        (["SRC", "OUT", "--label", "fog"], "haze"),
        (["SRC", "OUT", "--model", "no-such-model"], "dfpir-compact"),
        (["SRC", "OUT", "--classifier", "no-such-classifier"], "no-such-classifier"),
        (["SRC", "OUT", "--reference", "SRC/none"], "--reference"),
        (["SRC", "OUT", "--config", "SRC/none.toml"], "none.toml"),
        (["SRC", "SRC/notes.txt"], "notes.txt"),
        (["SRC", "SRC/../photographs/notes.txt/sub"], "notes.txt"),
        (["SRC", "/proc/nowhere/out"], "/proc/nowhere"),
        (["no:camera:such", "OUT"], "no:camera:such"),
    ],
)
def test_wrong_usage_ends_with_2_before_any_work(
    photographs: Path, tmp_path: Path, weights: list[str], arguments: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nothing")
    places = {"SRC": str(photographs)} | {name: str(tmp_path / name.lower()) for name in ("OUT", "EMPTY", "DANGLING")}
    filled = [places.get(a.split("/")[0], a.split("/")[0]) + a[len(a.split("/")[0]) :] for a in arguments]
    code, stdout, stderr = restore(Path(filled[0]), Path(filled[1]), [*weights, *filled[2:]])
    assert code == 2
    assert stdout == ""
    assert said in stderr
    assert not (tmp_path / "out" / "job.json").exists()
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.parametrize("place", [1, 3], ids=["model", "classifier"])
def test_damaged_weights_end_with_2(photographs: Path, tmp_path: Path, weights: list[str], place: int) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(Path(weights[place]).read_bytes()[:-100])
    code, _, stderr = restore(photographs, tmp_path / "out", [*weights, weights[place - 1], str(broken)])
    assert code == 2
    assert "broken.safetensors" in stderr
    assert not (tmp_path / "out" / "job.json").exists()


def test_an_ablation_is_refused_before_any_work(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    network = DFPIR(replace(TINY, attention_perturbation=False))
    save_checkpoint(tmp_path / "ablation.safetensors", network, orthogonal_bank(), licence="CC0-1.0", provenance={})
    model = ["--model", str(tmp_path / "ablation.safetensors")]
    code, _, stderr = restore(photographs, tmp_path / "out", [*weights, *model])
    assert code == 2
    assert "is an ablation without DGCPM or CAAPM" in " ".join(stderr.split())
    assert not (tmp_path / "out" / "job.json").exists()


def test_a_file_that_is_no_clip_ends_with_2(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    (tmp_path / "clip.pt").write_text("no weights")
    code, _, stderr = restore(photographs, tmp_path / "out", [*weights, "--classifier", f"clip:{tmp_path}/clip.pt"])
    assert code == 2
    assert "cannot be loaded as CLIP" in " ".join(stderr.split())
    assert not (tmp_path / "out" / "job.json").exists()


def test_options_come_from_a_toml_file_and_the_command_line_wins(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    file = tmp_path / "options.toml"
    file.write_text('label = "rain"\nformat = "png"\n')
    assert restore(photographs, tmp_path / "out", weights, "--config", file, "--label", "haze")[0] == 0
    rows = read_manifest(tmp_path / "out").to_pylist()
    assert {row["prompt"] for row in rows} == {"haze"}
    assert (tmp_path / "out" / "images" / "holiday" / "coffee.jpg.png").exists()


def test_a_limit_plans_the_first_images_and_can_be_lifted(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    out = tmp_path / "out"
    restore(photographs, out, weights, "--label", "rain", "--limit", "1")
    assert [row["relative_path"] for row in read_manifest(out).to_pylist()] == ["astronaut.png"]
    restore(photographs, out, weights, "--label", "rain")
    assert sorted(row["relative_path"] for row in read_manifest(out).to_pylist()) == [
        "astronaut.png", "holiday/coffee.jpg",
    ]  # fmt: skip


def test_plan_writes_no_image_and_restore_goes_on_from_it(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = invoke("plan", photographs, out, *weights, "--label", "rain", "--json")
    assert code == 0, stderr
    record = json.loads(stdout)
    assert (record["images"], record["left"], record["ignored"]) == (2, 2, 1)
    assert record["megapixels"] == pytest.approx((72 * 90 + 80 * 64) / 1e6)
    assert record["worker_seconds"] > 0
    assert (out / "job.json").exists()
    assert not [*out.rglob("*.png"), *out.rglob("*.jpg")]
    assert restore(photographs, out, weights, "--label", "haze")[0] == 0  # nothing was done yet: options may change
    assert {row["prompt"] for row in read_manifest(out).to_pylist()} == {"haze"}
    assert json.loads((out / "job.json").read_text())["config"]["label"] == "haze"
    code, stdout, _ = invoke("plan", photographs, out, *weights, "--label", "haze", "--json")
    record = json.loads(stdout)
    assert [record[name] for name in ("left", "bytes", "megapixels", "worker_seconds")] == [0, 0, 0, 0]
    shown = invoke("plan", photographs, out, *weights, "--label", "haze")[1]
    assert "2 in 1 shard, 0 left to do, 1 other file ignored" in shown
    assert restore(photographs, out, weights, "--label", "rain")[0] == 2


def test_a_plan_counts_the_classifiers_time_by_images_and_the_networks_by_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "_seconds_to_restore", lambda *_: 0.065536)  # for 256 x 256 px
    monkeypatch.setattr(networks, "_seconds_to_classify", lambda *_: 0.5)
    options = RestoreOptions(second_look=False)
    assert worker_seconds(options, images=10, megapixels=3) == pytest.approx(10 * 0.5 + 3)
    assert worker_seconds(RestoreOptions(), images=10, megapixels=3) == pytest.approx(10 * 1.0 + 3)
    assert worker_seconds(RestoreOptions(label="rain"), images=10, megapixels=3) == pytest.approx(3)


def test_a_plan_takes_the_classifiers_time_for_one_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def predict(images: list[object]) -> None:
        clock[0] += 0.25 * len(images)

    monkeypatch.setattr(networks, "_load_classifier", lambda _: SimpleNamespace(predict=predict))
    monkeypatch.setattr(networks, "_seconds_to_restore", lambda *_: 0.0)
    monkeypatch.setattr(networks, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    options = RestoreOptions(device="cpu", second_look=False)
    assert worker_seconds(options, images=8, megapixels=3) == pytest.approx(8 * 0.25)


def test_a_plan_times_a_gpus_network_once_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, recordings = [0.0], []

    def forward(image: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        clock[0] += 1.0
        return image

    def record(*_: object) -> Forward:
        recordings.append(clock[0])
        return lambda image, prompts: image  # a replay, which takes no time

    recorded = Recorded(forward, record=record)
    fake = SimpleNamespace(
        device=torch.device("cuda"), prompts=SimpleNamespace(keys=["rain"]),
        restore=lambda images, _: recorded(torch.zeros(len(images), 3, 256, 256), torch.zeros(1)),
    )  # fmt: skip
    monkeypatch.setattr(networks, "_load_restorer", lambda _: fake)
    monkeypatch.setattr(networks, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert worker_seconds(RestoreOptions(label="rain"), images=1, megapixels=1) == 0
    assert len(recordings) == 1


def test_a_plan_with_nothing_left_loads_no_network() -> None:
    assert worker_seconds(RestoreOptions(model="none such"), images=0, megapixels=0) == 0


@pytest.mark.parametrize(
    ("seconds", "told"), [(89, "89 s"), (600, "10 min"), (7200, "2.0 h"), (20_000_000, "231 days")]
)
def test_long_times_are_told_in_units_that_people_use(seconds: float, told: str) -> None:
    assert _duration(seconds) == told


def test_references_that_match_nothing_are_told_before_the_work(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    _, _, stderr = restore(photographs, tmp_path / "a", weights, "--label", "rain", "--reference", photographs)
    assert "for 2 of 2 images looked at" in stderr
    _, _, stderr = restore(photographs, tmp_path / "b", weights, "--label", "rain", "--reference", photographs.parent)
    assert "for 0 of 2 images looked at" in stderr


def test_a_list_may_begin_with_a_byte_order_mark(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    listed = photographs / "list.txt"
    listed.write_text("astronaut.png\n", encoding="utf-8-sig")
    assert restore(listed, tmp_path / "out", weights, "--label", "rain")[0] == 0
    assert [row["status"] for row in read_manifest(tmp_path / "out").to_pylist()] == ["restored"]


def test_one_photograph_that_cannot_be_linked_does_not_stop_the_others(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    link, first = os.link, min(path.name for path in photographs.iterdir() if path.suffix == ".png")

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == first:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    options = RestoreOptions(model=weights[1], classifier=weights[3], dtype="float32", device="cpu", clean="link")
    assert prepare(photographs, tmp_path / "out", options).left.image_count > 1


def test_a_run_whose_folders_are_gone_begins_anew(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    """Such as a copy without empty ones."""
    options = RestoreOptions(model=weights[1], classifier=weights[3], dtype="float32", device="cpu")
    directory = prepare(photographs, tmp_path / "out", options).directory
    for folder in (directory.manifest_dir, directory.journal_dir, directory.images_dir):
        if folder.exists():
            folder.rmdir()
    assert prepare(photographs, tmp_path / "out", options).left


@pytest.mark.skipif(shutil.which("unshare") is None, reason="`unshare` is of Linux")
@pytest.mark.parametrize(
    ("mounted_at", "out", "said"),
    [("same", "same/out", "inside SRC"), ("out/images", "out", "SRC itself"), ("around", "around", "inside OUT")],
)
def test_a_mounted_folder_is_known_under_its_other_name(
    photographs: Path, tmp_path: Path, mounted_at: str, out: str, said: str
) -> None:
    """As of containers. What lay in OUT/images without a row was removed: all of SRC."""
    (tmp_path / mounted_at).mkdir(parents=True)
    mounted = photographs.parent if mounted_at == "around" else photographs
    code = "import sys; from jobs import places; places._require_places(*map(places.Path, sys.argv[1:]))"
    script = 'mount --bind "$1" "$2" && echo mounted && exec "$3" -c "$4" "$5" "$6"'
    values = [mounted, tmp_path / mounted_at, sys.executable, code, photographs, tmp_path / out]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", *map(str, values)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.stdout != "mounted\n":
        pytest.skip("this user may not mount folders here")
    assert said in done.stderr.splitlines()[-1]


def test_results_do_not_go_into_the_source_by_a_link(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").symlink_to(photographs)
    with pytest.raises(UsageError, match=r"out/images is SRC itself"), sole_driver(photographs, tmp_path / "out"):
        pytest.fail("they would")


def test_a_fault_of_a_call_is_not_taken_for_one_of_its_lock(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="of the call"), sole_driver(photographs, tmp_path / "out"):
        raise FileNotFoundError(errno.ENOENT, "of the call", "file")


def test_links_to_another_file_system_are_refused_before_the_work(photographs: Path, weights: list[str]) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == photographs.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        code, _, stderr = restore(photographs, Path(folder) / "out", weights, "--clean", "link")
        assert tree(Path(folder)) == {}
    assert code == 2
    assert "cannot be linked into OUT (Invalid cross-device link)" in stderr


def test_a_list_with_a_name_of_what_is_not_whole_yet_is_refused(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    """The next call would remove its result."""
    name = ".grey.png.0123456789abcdef.partial"
    (photographs / name).write_bytes(b"x")
    (photographs / "list.txt").write_text(f"grey.png\n{name}\n")
    result = runner.invoke(app, ["restore", str(photographs / "list.txt"), str(tmp_path / "out"), *weights])
    assert (result.exit_code, f"the list names {name} (1 such)" in result.stderr) == (2, True)


def test_a_lock_that_another_call_takes_away_is_not_the_runs(photographs: Path, tmp_path: Path) -> None:
    """A call that ends with wrong usage removes it between another one's opening and locking it."""
    out, lock, taken = tmp_path / "out", fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if not taken:
            taken.append(how)
            (out / ".dfpir.lock").unlink()
        lock(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with sole_driver(photographs, out):
            assert taken
            patch.undo()
            with pytest.raises(UsageError, match="another process is working"), sole_driver(photographs, out):
                pytest.fail("two calls have the run")


def test_a_lock_that_is_a_link_empties_no_file(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".dfpir.lock").symlink_to(photographs / "astronaut.png")
    before = tree(photographs)
    with sole_driver(photographs, tmp_path / "out"):
        assert tree(photographs) == before


def test_a_list_of_the_runs_own_results_is_refused(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    out = tmp_path / "out"
    assert restore(photographs, out, weights, "--label", "rain")[0] == 0
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(tmp_path.rglob("*.png"))))
    before = tree(out / "images")
    code, _, stderr = restore(listed, tmp_path / "other", weights, "--label", "rain")
    assert code == 0, "results of another run are photographs like others"
    listed.rename(tmp_path / "again.txt")
    (tmp_path / "link").symlink_to(out.parent)
    new = tmp_path / "link" / "new"
    (tmp_path / "again.txt").write_text(f"{new / 'images' / 'astronaut.png'}\n")
    code, _, stderr = restore(tmp_path / "again.txt", new, weights, "--label", "rain")
    assert code == 2
    assert "the list names 1 results of this run" in stderr
    assert tree(out / "images") == before


def test_names_that_are_one_where_results_go_are_refused(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (photographs / "Astronaut.PNG").write_bytes((photographs / "astronaut.png").read_bytes())
    monkeypatch.setattr(RunDirectory, "folds_names", lambda directory: True)
    code, _, stderr = restore(photographs, tmp_path / "out", weights, "--label", "rain")
    assert code == 2
    assert "Astronaut.PNG and astronaut.png are one name" in stderr
    (photographs / "Astronaut.PNG").unlink()
    assert restore(photographs, tmp_path / "out", weights, "--label", "rain")[0] == 0


@pytest.mark.parametrize(
    ("fault", "message"), [(errno.ENOSYS, "a file system without locks"), (errno.EAGAIN, "another process")]
)
def test_a_lock_that_cannot_be_had_is_told_from_one_that_is_held(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch, fault: int, message: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr("jobs.places.fcntl.flock", refuse)
    code, _, stderr = restore(photographs, tmp_path / "out", weights)
    assert code == 2
    assert message in stderr


def test_a_run_without_hard_links_has_a_plan(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert restore(photographs, tmp_path / "out", weights, "--label", "rain")[0] == 0
    code, _, stderr = restore(photographs, tmp_path / "linked", weights, "--clean", "link")
    assert code == 2
    assert "cannot be linked into OUT (Operation not permitted)" in stderr


@pytest.mark.usefixtures("child_processes")
def test_rows_that_are_missing_at_the_end_break_the_run_off(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a worker had written them on a machine that sees another OUT."""
    monkeypatch.setattr(LocalRunner, "run", lambda *_, **__: None)
    code, stdout, stderr = restore(photographs, tmp_path / "out", weights, "--label", "rain")
    assert (code, stdout) == (1, "")
    assert "2 planned images have no row" in stderr
    assert "astronaut.png" in stderr


def test_folders_that_cannot_be_listed_are_part_of_the_result(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("holiday"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    code, stdout, _ = restore(photographs, tmp_path / "out", weights, "--label", "rain", "--json")
    assert code == 0
    assert json.loads(stdout)["unreadable_directories"] == ["holiday"]
    _, stdout, _ = restore(photographs, tmp_path / "out", weights, "--label", "rain")
    assert "1 folder, the first holiday" in stdout


@pytest.mark.parametrize(
    "command",
    [
        ["preview", ""], ["preview", "a.png", "--config", ""],
        ["demo", ""], ["evaluate", "--dataset", "pairs", "--root", ""], ["figures", "{here}", ""],
        ["train", "restorer", "{here}/a.toml", ""],
        ["train", "classifier", "{here}/a.toml", "{here}/out", "--export", ""],
    ],
)  # fmt: skip
def test_no_commands_empty_path_is_the_working_directory(tmp_path: Path, command: list[str]) -> None:
    code, _, stderr = invoke(*(each.format(here=tmp_path) for each in command))
    assert code == 2
    assert "it is empty" in stderr


def test_results_of_an_evaluation_replace_no_picture(photographs: Path, weights: list[str]) -> None:
    picture = photographs / "astronaut.png"
    before = tree(photographs)
    for name in ("reference", "degraded"):
        (photographs / name).mkdir()
        (photographs / name / "a.png").write_bytes(picture.read_bytes())
    code, _, stderr = invoke(
        "evaluate", "--dataset", "pairs", "--label", "rain", "--root", photographs, "--out", picture, *weights
    )
    assert code == 2
    assert "ends in .parquet" in stderr
    assert picture.read_bytes() == before["astronaut.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_nobody_can_take_is_one_line() -> None:
    code = "from jobs.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "models", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "dfpir: [Errno 28] No space left on device\n"


def test_what_pillow_warns_of_stays_out_of_the_terminal(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    picture = tmp_path / "a.jpg"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0cut short"
    Image.open(photographs / "holiday" / "coffee.jpg").save(picture, exif=exif)
    command = ["preview", picture, "--picture", tmp_path / "b.png", "--label", "rain", *weights]
    code = "from jobs.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "restored: rain as given" in done.stdout


def test_preview_says_why_and_writes_a_picture(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    picture = tmp_path / "new" / "picture.png"
    code, stdout, stderr = invoke(
        "preview", photographs / "astronaut.png", "--picture", picture, *weights, "--label", "haze"
    )
    assert code == 0, stderr
    assert "restored" in stdout
    assert "haze" in stdout
    assert Image.open(picture).width > 2 * 90
    before = tree(photographs)
    for name in ("holiday/coffee.jpg", "picture.raw", "notes.txt/picture.png"):
        code, _, stderr = invoke(
            "preview", photographs / "astronaut.png", "--picture", photographs / name, *weights, "--label", "haze"
        )
        assert code == 2, name
        assert Path(name).parts[0] in stderr
    assert tree(photographs) == before
    code, stdout, stderr = invoke("preview", photographs / "astronaut.png", "--picture", f"{'n' * 252}.png", *weights)
    assert (code, stdout) == (2, "")  # told before the work
    assert "File name too long" in stderr
    code, _, stderr = invoke("preview", photographs / "notes.txt", *weights)
    assert code == 2
    assert "notes.txt" in stderr


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_preview_of_a_grey_picture_shows_no_colour_as_none_would_be_written(
    photographs: Path, tmp_path: Path, weights: list[str], mode: str
) -> None:
    grey, picture = tmp_path / "grey.png", tmp_path / "picture.png"
    Image.open(photographs / "astronaut.png").convert("L").convert(mode).save(grey)
    code, _, stderr = invoke("preview", grey, "--picture", picture, *weights, "--label", "haze")
    assert code == 0, stderr
    sheet = np.asarray(Image.open(picture).convert("RGB"))
    assert (sheet == sheet[:, :, :1]).all()


def test_preview_has_the_colour_profile_of_its_photograph(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    for mode, expected in (("RGB", SRGB), ("L", None)):
        photograph, picture = tmp_path / f"{mode}.png", tmp_path / f"{mode}.webp"
        profile = SRGB if mode == "RGB" else SRGB[:16] + b"GRAY" + SRGB[20:]
        Image.open(photographs / "astronaut.png").convert(mode).save(photograph, icc_profile=profile)
        assert invoke("preview", photograph, "--picture", picture, *weights, "--label", "rain")[0] == 0
        with Image.open(picture) as sheet:
            assert sheet.info.get("icc_profile") == expected


def test_preview_shows_the_middle_of_a_large_photograph_at_full_size(tmp_path: Path, weights: list[str]) -> None:
    """Of a pattern that is grey once it is shrunk."""
    pixels = np.full((40, 2000, 3), 128, np.uint8)
    pixels[:, :, 0] += np.tile(np.array([-90, 90], np.int16), 1000).astype(np.uint8)
    photograph, picture = tmp_path / "large.png", tmp_path / "picture.png"
    Image.fromarray(pixels).save(photograph)
    assert invoke("preview", photograph, "--picture", picture, *weights, "--label", "rain")[0] == 0
    with Image.open(picture) as sheet:
        assert sheet.width == 2 * 800 + 3 * GAP_PX
        top = 2 * (CAPTION_PX + GAP_PX) + 800 * 40 // 2000
        assert np.array_equal(np.asarray(sheet)[top : top + 40, GAP_PX : GAP_PX + 400], pixels[:, 800:1200])


def test_preview_shows_what_is_transparent_on_white(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    cut, picture = tmp_path / "cut.png", tmp_path / "picture.png"
    with Image.open(photographs / "astronaut.png") as image:
        channels = np.dstack([image, np.full((image.height, image.width), 255, np.uint8)])
    channels[:30] = 0
    Image.fromarray(channels).save(cut)
    code, _, stderr = invoke("preview", cut, "--picture", picture, *weights, "--label", "haze")
    assert code == 0, stderr
    sheet = np.asarray(Image.open(picture).convert("RGB"))
    assert sheet[22:40].min() == 255  # below the captions


def test_greyscale_and_transparency_survive(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(photographs / "grey.png")
    Image.fromarray(rng.integers(0, 256, (40, 50, 4), dtype=np.uint8)).save(photographs / "alpha.png")
    assert restore(photographs, tmp_path / "out", weights, "--label", "noise:50")[0] == 0
    grey, alpha = (Image.open(tmp_path / "out" / "images" / name) for name in ("grey.png", "alpha.png"))
    assert (grey.mode, alpha.mode) == ("L", "RGBA")
    assert np.array_equal(np.asarray(alpha)[:, :, 3], np.asarray(Image.open(photographs / "alpha.png"))[:, :, 3])


def test_models_lists_hash_licence_and_quality() -> None:
    code, stdout, _ = invoke("models", "--json")
    assert code == 0
    records = {record["name"]: record for record in json.loads(stdout)}
    for name in ("dfpir-compact", "degradation-small"):
        assert len(records[name]["sha256"]) == 64
        assert records[name]["licence"]
        assert records[name]["quality"]
    shown = invoke("models")[1]
    assert "dfpir-compact" in shown
    assert [line for line in shown.splitlines() if len(line) > 80 and not line.startswith("  file ")] == []


TRAINING = """
steps = 1
[data]
clean = ["{folder}"]
[model]
dim = 8
num_blocks = [1, 1, 1, 1]
num_refinement_blocks = 1
unshuffle_factor = 2
[[phases]]
start = 0.0
patch_px = 32
batch = 1
tasks = {{ noise = 1.0 }}
"""


def test_a_restorer_is_trained_from_a_configuration(tmp_path: Path) -> None:
    folder, config, out = tmp_path / "clean", tmp_path / "some.toml", tmp_path / "out"
    folder.mkdir()
    for number in range(30):
        Image.fromarray(np.roll(data.coffee(), 20 * number, axis=1)[:200, :200]).save(folder / f"photo-{number}.png")
    config.write_text(TRAINING.format(folder=folder))
    command = ("train", "restorer", config, out, "--device", "cpu", "--threads", 1)
    assert invoke(*command)[0] == 0
    assert (out / "checkpoint.pt").exists()
    assert list((out / "samples").iterdir())
    config.write_text(TRAINING.format(folder=folder).replace("batch = 1", "batch = 2"))
    code, _, said = invoke(*command)
    assert code == 2
    assert "belongs to another training" in said
    config.write_text(TRAINING.format(folder=folder).replace("dim = 8", "dim = 1000000"))
    code, _, said = invoke("train", "restorer", config, tmp_path / "huge", "--device", "cpu")
    assert code == 2
    assert " parameters takes " in said
    assert "cpu has " in said
    assert not (tmp_path / "huge").exists()
    config.write_text("steps = 1")
    code, _, said = invoke(*command)
    assert code == 2
    assert f"{config}: data is missing" in said


@pytest.mark.usefixtures("child_processes")
def test_a_disk_that_fills_up_ends_the_run_and_the_same_command_goes_on(
    photographs: Path, tmp_path: Path, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, "fill:before-rename:coffee.jpg")
    code, _, stderr = restore(photographs, tmp_path / "out", weights, "--label", "rain")
    assert code == 1
    assert "No space left on device" in stderr
    assert "the same command goes on" in stderr
    monkeypatch.delenv(FAULT)
    code, stdout, _ = restore(photographs, tmp_path / "out", weights, "--label", "rain", "--json")
    assert (code, json.loads(stdout)["counts"]["restored"]) == (0, 2)


def test_failed_images_are_done_again_on_request(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    whole = (photographs / "astronaut.png").read_bytes()
    cut = photographs / "cut.png"
    cut.write_bytes(whole[:3000] + bytes(len(whole) - 3000))
    times = cut.stat().st_atime_ns, cut.stat().st_mtime_ns
    command = (photographs, tmp_path / "out", weights, "--label", "rain", "--max-failed-fraction", "1", "--json")
    assert json.loads(restore(*command)[1])["counts"]["failed"] == 1
    cut.write_bytes(whole)
    os.utime(cut, ns=times)  # nothing tells that the file is another one
    assert json.loads(restore(*command)[1])["counts"]["failed"] == 1
    code, stdout, stderr = restore(*command, "--retry-failed")
    summary = json.loads(stdout)
    assert code == 0
    assert "1 again" in stderr
    assert (summary["counts"]["restored"], summary["counts"]["failed"], summary["done_before"]) == (3, 0, 2)
    rows = {row["relative_path"]: row["revision"] for row in read_manifest(tmp_path / "out").to_pylist()}
    assert rows == {"astronaut.png": 0, "cut.png": 1, "holiday/coffee.jpg": 0}
    assert json.loads(restore(*command, "--retry-failed")[1])["done_before"] == 3


def test_a_file_that_would_take_the_place_of_a_result_is_refused(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    command = (photographs, tmp_path / "out", weights, "--label", "rain", "--format", "png")
    assert restore(*command)[0] == 0
    before = tree(tmp_path / "out")
    assert "images/holiday/coffee.jpg.png" in before
    (photographs / "holiday" / "coffee.jpg.png").write_bytes((photographs / "astronaut.png").read_bytes())
    code, _, stderr = restore(*command)
    assert code == 2
    assert "holiday/coffee.jpg.png in the source has the name" in stderr
    assert tree(tmp_path / "out") == before


def test_a_result_stays_when_its_photograph_leaves_and_another_could_have_its_name(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    first, second = photographs / "a.jpg", photographs / "a.jpg.png"
    Image.fromarray(data.coffee()[:64, :64]).save(first)
    Image.fromarray(data.astronaut()[:64, :64]).save(second)
    out = tmp_path / "out"
    command = (photographs, out, weights, "--label", "rain", "--format", "png")
    assert restore(*command)[0] == 0
    second.unlink()
    Image.fromarray(data.chelsea()[:64, :64]).save(first)
    assert restore(*command)[0] == 0
    rows = {row["relative_path"]: row for row in read_manifest(out).to_pylist()}
    assert rows["a.jpg"]["revision"] == 1
    assert {name: rows[name]["output_uri"] for name in ("a.jpg", "a.jpg.png")} == {
        "a.jpg": "images/a.jpg.restored.png", "a.jpg.png": "images/a.jpg.png",
    }  # fmt: skip
    for row in rows.values():
        assert hashlib.sha256((out / row["output_uri"]).read_bytes()).hexdigest() == row["output_sha256"]


def test_a_folder_that_was_there_before_wrong_usage_stays_and_others_go(tmp_path: Path) -> None:
    there, new = tmp_path / "there", tmp_path / "new" / "deep"
    there.mkdir()
    for out in (there, new):
        assert invoke("restore", tmp_path / "nowhere", out)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_kill_before_a_run_began_leaves_a_folder_that_can_be_used(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".dfpir.lock").touch()
    (out / ".job.json.0123456789abcdef.partial").touch()
    assert restore(photographs, out, weights, "--label", "rain")[0] == 0
    assert not list(out.glob("*.partial")) + list(out.glob(".*.partial"))


@pytest.mark.parametrize("place", [1, 2])
def test_a_loop_of_links_is_told_of(photographs: Path, tmp_path: Path, place: int) -> None:
    (tmp_path / "loop").symlink_to("loop")
    arguments = ["restore", photographs, tmp_path / "out"]
    arguments[place] = tmp_path / "loop"
    code, _, stderr = invoke(*arguments)
    assert code == 2
    assert "loop" in stderr


def test_a_file_of_a_models_name_does_not_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("dfpir-compact", "degradation-small", "mine"):
        Path(name).touch()
    assert [_absolute(name) for name in ("dfpir-compact", "degradation-small")] == [
        "dfpir-compact",
        "degradation-small",
    ]
    assert _absolute("mine") == str(tmp_path / "mine")


@pytest.mark.parametrize("place", [1, 2])
def test_an_empty_path_is_not_the_working_directory(photographs: Path, tmp_path: Path, place: int) -> None:
    arguments = ["restore", str(photographs), str(tmp_path / "out")]
    arguments[place] = ""
    code, _, stderr = invoke(*arguments)
    assert code == 2
    assert "it is empty" in " ".join(stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_list_in_utf_16_is_refused_before_any_work(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    listed = photographs / "some.txt"
    listed.write_text("astronaut.png\n", encoding="utf-16-le")
    code, _, stderr = invoke("plan", listed, tmp_path / "out")
    assert code == 2
    assert "NUL" in stderr
    assert "UTF-8" in stderr
    assert not (tmp_path / "out").exists()


def test_control_characters_of_a_name_do_not_reach_the_terminal(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    (photographs / "evil\x1b[31m\nfailed: fake.png").write_bytes(b"no image")
    _, stdout, _ = restore(photographs, tmp_path / "out", weights, "--label", "rain")
    assert "\x1b[31m" not in stdout
    assert "evil\\x1b[31m\\nfailed: fake.png" in "".join(stdout.splitlines())
    code, _, stderr = invoke("preview", photographs / "no\x1b[31mne.png")
    assert (code, "\x1b[31m" in stderr, "no\\x1b[31mne.png" in stderr) == (2, False, True)


@pytest.mark.parametrize("name", ["写真　一.jpg", "a\u00a0b.png", "👨\u200d👩.png", "ü.png"])
def test_names_of_all_scripts_are_shown_as_they_are(name: str) -> None:
    assert harmless(name) == name


def test_names_in_brackets_are_told_as_they_are(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    out = tmp_path / "a[/b] [red]"
    code, stdout, _ = restore(photographs, out, weights, "--label", "rain")
    assert code == 0
    assert "a[/b][red]/images" in "".join(stdout.split())


def test_the_help_tells_the_defaults() -> None:
    _, stdout, _ = invoke("restore", "--help")
    told = " ".join(stdout.split())
    names = ("model", "classifier", "label", "format", "quality", "clean", "engine", "device", "dtype", "tile")
    for name in (*names, "max_failed_fraction"):
        option = told.index(f"--{name.replace('_', '-')} ")
        default = RestoreOptions.model_fields[name].default
        assert f"default: {default}." in told[option : told.index(" --", option + 1)], name


@pytest.mark.parametrize(
    "command", ["restore", "plan", "preview", "evaluate", "figures", "train restorer", "train classifier"]
)
def test_the_help_of_an_option_says_whether_it_takes_a_file_or_a_folder(command: str) -> None:
    options = invoke(*command.split(), "--help")[1].split("Options:")[1]
    assert "<path>" not in options.lower()


def test_no_summary_of_a_command_is_cut_off_at_eighty_columns() -> None:
    for command in ([], ["train"]):
        told = runner.invoke(app, [*command, "--help"], terminal_width=78).stdout  # margins take two
        assert "Commands:" in told
        assert "..." not in told.split("Commands:")[1]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(given: dict[str, str], spins: str) -> None:
    """As GNU OpenMP itself reports it, once torch has loaded it behind the command's module."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= given | {"OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, "-c", "import jobs.cli, torch"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("torch has another OpenMP here")
    assert f"GOMP_SPINCOUNT = '{spins}'" in told


IMPORTING = """
import os, signal, sys
from jobs import cli
from jobs.terminal import faults_explained
from jobs.signals import signals_raise

@cli.app.command()
def swallow(number: int) -> None:
    with faults_explained(), signals_raise():
        try:
            import module_that_is_interrupted
        except BaseException:
            pass
    print("went on")

sys.argv = ["dfpir", "swallow", sys.argv[1]]
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
cli.main()
"""


@pytest.mark.parametrize(("number", "said"), [(2, "dfpir: interrupted\n"), (15, "dfpir: ended by SIGTERM\n")])
def test_a_signal_during_an_import_is_not_swallowed(tmp_path: Path, number: int, said: str) -> None:
    (tmp_path / "module_that_is_interrupted.py").write_text("import os, sys\nos.kill(os.getpid(), int(sys.argv[2]))")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    command = [sys.executable, "-c", IMPORTING, str(number)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", said)


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_changes_no_exit_code(closed: str) -> None:
    command = f"{sys.executable} -m jobs.cli models --json {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_with_closed_streams_is_done(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    out = tmp_path / "out"
    arguments = [photographs, out, *weights, "--label", "rain", "--engine", "local"]
    command = f"{sys.executable} -m jobs.cli restore {' '.join(map(str, arguments))} <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    assert {row["status"] for row in read_manifest(out).to_pylist()} == {"restored"}


def test_the_version_is_told() -> None:
    code, stdout, _ = invoke("--version")
    assert (code, stdout) == (0, f"dfpir {version('dfpir')}\n")


def test_help_names_what_a_classifier_is_trained_from() -> None:
    _, stdout, _ = invoke("train", "classifier", "--help")
    assert "configs/classifier.toml" in stdout
    assert "of each worker" not in stdout


def test_a_fault_of_the_options_file_names_it_and_one_of_the_command_line_does_not(
    photographs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "options.toml"
    file.write_text('label = "fog"\nmax-workers = 0\n')
    code, _, stderr = invoke("restore", photographs, tmp_path / "out", "--config", file)
    assert code == 2
    assert f'{file}: --label "fog"' in stderr
    assert "--max-workers 0" in stderr
    file.write_text('label = "rain"\n')
    code, _, stderr = invoke("restore", photographs, tmp_path / "out", "--config", file, "--quality", "200")
    assert code == 2
    assert "--quality 200" in stderr
    assert file.name not in stderr


def test_wrong_inputs_leave_no_empty_folder_behind(photographs: Path, tmp_path: Path, weights: list[str]) -> None:
    config, out = tmp_path / "some.toml", tmp_path / "out"
    config.write_text(TRAINING.format(folder=tmp_path / "nowhere"))
    commands = [
        ("figures", tmp_path / "nowhere", out, *weights),
        ("train", "restorer", config, out, "--device", "cpu"),
    ]
    for command in commands:
        code, _, stderr = invoke(*command)
        assert code == 2
        assert "nowhere is not a folder" in stderr
        assert not out.exists()
        out.mkdir()
        assert invoke(*command)[0] == 2
        out.rmdir()


def test_a_file_that_could_not_be_read_is_tried_again_once_it_is_there(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("photographs/astronaut.png\nphotographs/holiday/coffee.jpg\n")
    away = (photographs / "astronaut.png").rename(tmp_path / "away.png")
    command = [listed, tmp_path / "out", weights, "--label", "rain", "--json", "--max-failed-fraction", "1"]
    assert json.loads(restore(*command)[1])["counts"]["failed"] == 1
    assert json.loads(restore(*command)[1])["done_before"] == 2, "it is not there: nothing to try"
    away.rename(photographs / "astronaut.png")
    again = json.loads(restore(*command)[1])
    assert (again["done_before"], again["counts"]["restored"], again["counts"]["failed"]) == (1, 2, 0)


def test_a_part_of_the_source_that_was_away_is_done_once_it_is_back(
    photographs: Path, tmp_path: Path, weights: list[str]
) -> None:
    command = [photographs, tmp_path / "out", weights, "--label", "rain", "--json", "--max-failed-fraction", "1"]
    assert invoke("plan", photographs, tmp_path / "out", *weights, "--label", "rain")[0] == 0
    away = (photographs / "holiday").rename(tmp_path / "away")
    assert json.loads(restore(*command)[1])["counts"]["failed"] == 1
    away.rename(photographs / "holiday")
    counts = json.loads(restore(*command)[1])["counts"]
    assert (counts["restored"], counts["failed"]) == (2, 0)
