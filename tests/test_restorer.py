import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_weights import golden_state, tiny_network, write_tiny_model

from models import Restorer, load_restorer, orthogonal_bank
from models.dfpir import DFPIR, DFPIRConfig
from models.errors import WeightsError
from models.memory import MEMORY_SHARE, available_bytes, bytes_needed, bytes_per_pixel, is_out_of_memory, total_bytes
from models.padding import padded_size
from models.precision import fastest_dtype
from models.weights import save_checkpoint
from pipeline.batching import is_device_lost

KEYS = ("noise15", "rain", "haze", "lowlight", "blur")


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return Restorer(tiny_network(), orthogonal_bank())


def photographs(*sizes, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    scale = {np.uint8: 256, np.uint16: 65536}
    if dtype == np.float32:
        return [rng.random((*size, 3), dtype=np.float32) for size in sizes]
    return [rng.integers(0, scale[dtype], (*size, 3), dtype=dtype) for size in sizes]


def levels_apart(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 3), (16, 16), (33, 31)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_any_size_and_dtype_comes_back_changed_in_the_same_form(restorer, size, dtype):
    (image,) = photographs(size, dtype=dtype)
    (restored,) = restorer.restore([image], ["rain"])
    assert (restored.shape, restored.dtype) == (image.shape, image.dtype)
    assert restored.flags["C_CONTIGUOUS"]
    assert not np.array_equal(restored, image)
    if dtype == np.float32:
        assert 0 <= restored.min() <= restored.max() <= 1


def test_dtypes_agree_with_each_other(restorer):
    (image,) = photographs((24, 20))
    as_uint8, as_uint16, as_float = restorer.restore(
        [image, image.astype(np.uint16) * 257, (image / 255).astype(np.float32)], ["haze"] * 3
    )
    assert levels_apart(as_uint8, np.rint(as_float * 255)) <= 1
    assert levels_apart(as_uint16, np.rint(as_float * 65535)) <= 257
    assert np.mean(as_uint8 == np.rint(as_float * 255)) > 0.99, "integers are rounded, not cut off"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_mixed_sizes_and_degradations_equals_singles(dtype):
    """But for a level, or what bfloat16 rounds off anyway: products of other sizes add up in another order."""
    restorer, exact = (Restorer(tiny_network(), orthogonal_bank(), dtype=each) for each in (dtype, torch.float32))
    images = photographs((40, 30), (35, 32), (8, 8), (40, 30), (100, 20))
    together = restorer.restore(images, KEYS)
    for image, key, restored in zip(images, KEYS, together, strict=True):
        (alone,), (unrounded,) = (each.restore([image], [key]) for each in (restorer, exact))
        assert restored.shape == image.shape
        assert levels_apart(restored, alone) <= max(1, levels_apart(alone, unrounded))


@pytest.mark.parametrize("golden", [False, True])
def test_a_picture_of_a_single_feature_is_the_same_in_any_batch(golden):
    """At the published size it has one pixel at the lowest level, where all cosines are 1 or -1, and tie."""
    torch.manual_seed(0)
    network = DFPIR(DFPIRConfig()).eval()
    if golden:
        network.load_state_dict(golden_state({key: value.shape for key, value in network.state_dict().items()}))
    restorer = Restorer(network, orthogonal_bank())
    images = photographs((8, 8), (5, 7), (8, 3))
    together = restorer.restore(images, KEYS[:3])
    for image, key, restored in zip(images, KEYS, together, strict=False):
        (alone,) = restorer.restore([image], [key])
        assert levels_apart(restored, alone) <= 1


def test_the_prompt_key_decides(restorer):
    (image,) = photographs((32, 32))
    rain, haze = restorer.restore([image, image], ["rain", "haze"])
    assert levels_apart(rain, haze) > 1


def test_images_are_padded_and_then_cropped(restorer):
    (image,) = photographs((20, 28))
    tall, wide = padded_size(20, 28, 16)
    mirrored = np.pad(image, ((0, tall - 20), (0, wide - 28), (0, 0)), mode="symmetric")
    small, large = restorer.restore([image, mirrored], ["blur", "blur"])
    assert levels_apart(small, large[:20, :28]) <= 1


def test_views_are_restored_as_copies_are_and_left_as_they_are(restorer):
    (image,) = photographs((32, 48))
    flipped = image[::-1, ::2]
    before = flipped.copy()
    (of_view,), (of_copy,) = restorer.restore([flipped], ["rain"]), restorer.restore([before], ["rain"])
    assert np.array_equal(of_view, of_copy)
    assert np.array_equal(flipped, before)


def test_batches_stay_within_the_limit_and_give_the_same(monkeypatch):
    restorer = Restorer(tiny_network(), orthogonal_bank(), tile="off")
    images = photographs(*[(32, 32)] * 5)
    whole = restorer.restore(images, KEYS)
    restorer.memory_budget_bytes = int(2.5 * 32 * 32 * bytes_per_pixel(tiny_network().config, torch.float32))
    assert restorer.batch_limit(32, 32, tile_px=None) == 2
    sizes = []
    run = restorer._run
    monkeypatch.setattr(restorer, "_run", lambda batch, keys: sizes.append(len(batch)) or run(batch, keys))
    chunked = restorer.restore(images, KEYS)
    assert sizes == [2, 2, 1]
    assert all(levels_apart(a, b) <= 1 for a, b in zip(whole, chunked, strict=True))


def test_auto_tiles_what_exceeds_the_memory_and_nothing_else():
    restorer = Restorer(tiny_network(), orthogonal_bank())
    assert restorer.tile_px_for(200, 200, "rain") is None
    per_pixel = bytes_per_pixel(tiny_network().config, torch.float32)
    held_whole = 24 * padded_size(200, 200, restorer.size_multiple)[0] ** 2
    restorer.memory_budget_bytes = int(100 * 100 * per_pixel) + held_whole
    assert restorer.tile_px_for(90, 80, "rain") is None
    assert restorer.tile_px_for(200, 200, "rain") == 96
    assert restorer.batch_limit(200, 200, tile_px=96) == 1
    (image,) = photographs((130, 150))
    (restored,) = restorer.restore([image], ["rain"])
    assert restored.shape == image.shape


def test_memory_that_an_image_needs_restores_it_whole(monkeypatch):
    restorer = Restorer(tiny_network(), orthogonal_bank())
    needed = bytes_needed(1024 * 1024, tiny_network().config, torch.float32, "cpu")
    restorer.memory_budget_bytes = int(MEMORY_SHARE["cpu"] * needed) + 1
    assert restorer.tile_px_for(1024, 1024, "rain") is None
    assert restorer.tile_px_for(1024, 1040, "rain") is not None
    on_gpu = bytes_needed(1024 * 1024, tiny_network().config, torch.bfloat16, "cuda")
    assert on_gpu > 2 * 2**30 + 1024 * 1024 * bytes_per_pixel(tiny_network().config, torch.bfloat16, "cuda")


def test_sharers_divide_the_memory(monkeypatch):
    monkeypatch.setattr("models.restorer.available_bytes", lambda device: 1000)
    monkeypatch.setattr("models.restorer.total_bytes", lambda device: 1200)
    budgets = [Restorer(tiny_network(), orthogonal_bank(), sharers=n).memory_budget_bytes for n in (1, 2, 3)]
    assert budgets == [500, 300, 200]


def test_off_never_tiles_and_a_number_forces_tiles_of_its_multiple():
    off = Restorer(tiny_network(), orthogonal_bank(), tile="off")
    off.memory_budget_bytes = 1
    assert off.tile_px_for(5000, 5000, "rain") is None
    assert off.batch_limit(5000, 5000, tile_px=None) == 1
    forced = Restorer(tiny_network(), orthogonal_bank(), tile=40)
    assert forced.tile_px_for(48, 48, "rain") is None
    assert forced.tile_px_for(49, 10, "rain") == 48


def test_tiles_asked_for_are_those_of_a_restorer_that_always_cuts():
    (image,) = photographs((100, 120))
    (whole,) = Restorer(tiny_network(), orthogonal_bank()).restore([image], ["rain"])
    (asked,) = Restorer(tiny_network(), orthogonal_bank()).restore([image], ["rain"], tile_px=63)
    (always,) = Restorer(tiny_network(), orthogonal_bank(), tile=64).restore([image], ["rain"])
    assert levels_apart(asked, always) <= 1
    assert levels_apart(asked, whole) > 1


@pytest.mark.parametrize("tile_px", [0, 8, 16, 31])
def test_tiles_too_small_to_overlap_are_refused(restorer, tile_px):
    with pytest.raises(ValueError, match="at least 32 pixels"):
        restorer.restore(photographs((100, 120)), ["rain"], tile_px=tile_px)


def test_a_prompt_with_a_window_restores_larger_images_in_tiles_of_it():
    windowed, tiled, whole = (
        Restorer(tiny_network(), orthogonal_bank(), tile=tile, windows_px={"rain": 64}) for tile in ("auto", 64, "off")
    )
    images = photographs((100, 120), (64, 60))
    for image, key, like in ((images[0], "rain", tiled), (images[0], "haze", whole), (images[1], "rain", whole)):
        (found,), (expected,) = (restorer.restore([image], [key]) for restorer in (windowed, like))
        assert levels_apart(found, expected) <= 1
    assert levels_apart(windowed.restore(images[:1], ["rain"])[0], whole.restore(images[:1], ["rain"])[0]) > 1
    assert windowed.tile_px_for(100, 120, "rain") == 64
    assert [windowed.tile_px_for(*size, key) for size, key in (((64, 64), "rain"), ((100, 120), "haze"))] == [None] * 2


def test_windows_and_whole_images_mix_in_a_batch():
    restorer = Restorer(tiny_network(), orthogonal_bank(), windows_px={"rain": 64, "blur": 80})
    images, keys = photographs((100, 120), (100, 120), (100, 120)), ["rain", "haze", "blur"]
    for image, key, found in zip(images, keys, restorer.restore(images, keys), strict=True):
        assert levels_apart(found, restorer.restore([image], [key])[0]) <= 1


def test_little_memory_makes_a_window_smaller():
    restorer = Restorer(tiny_network(), orthogonal_bank(), windows_px={"rain": 512})
    assert restorer.tile_px_for(600, 600, "rain") == 512
    restorer.memory_budget_bytes = int(256 * 256 * restorer._bytes_per_pixel) + 1 + 24 * 608 * 608
    assert restorer.tile_px_for(600, 600, "rain") == 256


def test_smaller_tiles_halve_until_they_are_too_small():
    auto, off = (Restorer(tiny_network(), orthogonal_bank(), tile=tile) for tile in ("auto", "off"))
    assert auto.smaller_tile_px(500, 300, than=None) == 256
    assert auto.smaller_tile_px(500, 300, than=256) == 128
    assert auto.smaller_tile_px(500, 300, than=100) is None
    assert off.smaller_tile_px(500, 300, than=None) is None


def test_tiles_restore_what_a_tile_of_its_own_would_give_away_from_overlaps():
    restorer = Restorer(tiny_network(), orthogonal_bank(), tile=64)
    (image,) = photographs((64, 112))
    (tiled,) = restorer.restore([image], ["haze"])
    (first,) = restorer.restore([image[:, :64]], ["haze"])
    assert levels_apart(tiled[:, :48], first[:, :48]) <= 1


@pytest.mark.parametrize(
    ("images", "keys", "error", "message"),
    [
        (photographs((8, 8)), ["snow"], KeyError, "no prompt for snow; this model knows noise15"),
        (photographs((8, 8)), [], ValueError, "1 images but 0 prompt keys"),
        ([np.zeros((8, 8), np.uint8)], ["rain"], ValueError, "expected H x W x 3"),
        ([np.zeros((8, 8, 4), np.uint8)], ["rain"], ValueError, "expected H x W x 3"),
        ([np.zeros((0, 8, 3), np.uint8)], ["rain"], ValueError, "expected H x W x 3"),
        ([np.zeros((8, 8, 3))], ["rain"], ValueError, "float64"),
        ([np.full((8, 8, 3), 255, np.float32)], ["rain"], ValueError, r"float32 in \[0, 1\], found 255.0 to 255.0"),
        ([np.full((8, 8, 3), np.nan, np.float32)], ["rain"], ValueError, "found nan to nan"),
        ([np.full((8, 8, 3), -np.inf, np.float32)], ["rain"], ValueError, "found -inf to -inf"),
        ([Image.new("RGB", (8, 8))], ["rain"], ValueError, "NumPy arrays, found Image"),
        (photographs((8, 8)), [None], KeyError, "no prompt for None; this model knows noise15"),
    ],
)
def test_what_cannot_be_restored_is_refused(restorer, images, keys, error, message):
    with pytest.raises(error, match=message):
        restorer.restore(images, keys)


def test_no_images_give_no_images(restorer):
    assert restorer.restore([], []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, "float32 or bfloat16"),
        ({"device": "mps"}, "device must be cpu or cuda, not mps"),
        ({"tile": 16}, "at least 32 pixels"),
        ({"tile": "always"}, "auto, off or a number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Restorer(tiny_network(), orthogonal_bank(), **options)


def test_cuda_is_not_silently_replaced_by_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        Restorer(tiny_network(), orthogonal_bank(), device="cuda")


def test_loading_by_path_equals_the_network_as_it_was_saved(tmp_path):
    path = write_tiny_model(tmp_path / "tiny.safetensors")
    loaded = load_restorer(path)
    assert (loaded.name, len(loaded.sha256), loaded.size_multiple) == ("tiny.safetensors", 64, 16)
    images = photographs((32, 40), (20, 20))
    direct = Restorer(tiny_network(), orthogonal_bank()).restore(images, ["rain", "blur"])
    for a, b in zip(loaded.restore(images, ["rain", "blur"]), direct, strict=True):
        assert levels_apart(a, b) <= 2, "more than the rounding of weights to float16 explains"


def test_an_unknown_name_is_refused_listing_the_valid_ones():
    with pytest.raises(WeightsError, match="neither a weights file nor a shipped model; shipped models: "):
        load_restorer("dfpir-huge")


def test_memory_is_known_and_grows_with_the_network():
    assert 0 < available_bytes(torch.device("cpu")) <= total_bytes(torch.device("cpu"))
    config = tiny_network().config
    assert bytes_per_pixel(config, torch.bfloat16, "cuda") < bytes_per_pixel(config, torch.float32, "cuda")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups in a folder: `groups(MEMBERSHIPS, {FOLDER: (limit, used, cached)})`, by default of version 2."""
    monkeypatch.setattr("models.memory._CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr("models.memory._MEMBERSHIPS", tmp_path / "memberships")

    def make(memberships, limits, *, files=("memory.max", "memory.current"), prefix=""):
        (tmp_path / "memberships").write_text(memberships)
        for name, (limit, used, cached) in limits.items():
            folder = tmp_path / "cgroup" / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, value in zip(files, (limit, used), strict=True):
                (folder / file).write_text(f"{value}\n")
            (folder / "memory.stat").write_text(
                f"anon 1024\n{prefix}inactive_file {cached - 5}\n{prefix}active_file 5\nslab 9\n"
            )

    return make


CPU = torch.device("cpu")


def test_files_in_the_page_cache_do_not_count_as_used_memory_of_a_container(groups):
    free = available_bytes(CPU)
    limit = free // 2
    groups("0::/\n", {".": (limit, limit, limit // 4)})
    assert (available_bytes(CPU), total_bytes(CPU)) == (limit // 4, limit)
    groups("0::/\n", {".": ("max", limit, 100)})
    assert available_bytes(CPU) > limit


def test_the_tightest_of_the_groups_above_a_process_counts(groups):
    free = available_bytes(CPU)
    inner, outer = free // 2, free // 3
    groups("0::/jobs/one\n", {"jobs/one": (inner, 0, 10), "jobs": (outer, 0, 10), ".": ("max", 0, 10)})
    assert (available_bytes(CPU), total_bytes(CPU)) == (outer, outer)


@pytest.mark.parametrize("folder", ["docker/one", "."])
def test_limits_of_the_first_version_of_groups_count(groups, folder):
    """In a container the group lies at the root, under another path than the host's."""
    limit = available_bytes(CPU) // 2
    groups(
        "5:cpu:/\n4:memory:/docker/one\n", {f"memory/{folder}": (limit, 30, 20)},
        files=("memory.limit_in_bytes", "memory.usage_in_bytes"), prefix="total_",
    )  # fmt: skip
    assert (available_bytes(CPU), total_bytes(CPU)) == (limit - 10, limit)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("full"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("could not create a primitive"),  # oneDNN, beyond a limit on a process's memory
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_full_memory_is_known_by_whatever_says_so_and_is_no_lost_device(error):
    assert is_out_of_memory(error)
    assert not is_device_lost(error)


def test_a_lost_device_is_no_full_memory():
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert is_device_lost(error)
    assert not is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("a file named out of memory.png"))


def test_what_onednn_cannot_do_at_all_is_no_full_memory():
    """It would be tried again in ever smaller tiles."""
    kind = "could not create a primitive descriptor for the convolution forward propagation primitive. Run workload"
    assert not is_out_of_memory(RuntimeError(kind))


def test_tiles_leave_room_for_the_image_that_is_held_whole():
    restorer = Restorer(tiny_network(), orthogonal_bank())
    whole = 24 * 2048 * 2048
    restorer.memory_budget_bytes = int(1024 * 1024 * restorer._bytes_per_pixel) + 1 + whole
    assert 2048 * 2048 * restorer._bytes_per_pixel > restorer.memory_budget_bytes
    assert restorer.tile_px_for(2048, 2048, "rain") == 1024
    assert restorer.batch_limit(2048, 2048, tile_px=1024) == 1
    restorer.memory_budget_bytes = whole // 2
    side = restorer.tile_px_for(2048, 2048, "rain")
    assert 0.2 < side * side * restorer._bytes_per_pixel / restorer.memory_budget_bytes <= 0.25


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_image_takes_more_memory_than_estimated(dtype, tmp_path):
    emulated = dtype == "bfloat16" and fastest_dtype("cpu") is torch.float32  # and slow
    plain, side_px = tiny_network(unshuffle_factor=1), 800 if emulated else 1600
    save_checkpoint(tmp_path / "tiny.safetensors", plain, orthogonal_bank(), licence="Apache-2.0", provenance={})
    command = [sys.executable, "-m", "benchmarks.engine", "--peak-of", f"inference {dtype}", "--threads", "1"]
    command += ["--model", str(tmp_path / "tiny.safetensors"), "--memory", f"{side_px}x{side_px}", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    estimated = bytes_per_pixel(plain.config, getattr(torch, dtype))
    bands = 120e6 / side_px**2
    assert 0.4 * estimated < int(done.stdout) / side_px**2 < estimated + bands


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_an_image_in_tiles_is_held_twice_as_floats_and_no_more(tmp_path):
    """Each time twelve bytes for a pixel; as many again are for a tile, and for the image as bytes."""
    script = """
import sys
import numpy as np
from benchmarks.process_memory import peak_bytes
from models.restorer import load_restorer
restorer = load_restorer(sys.argv[1], tile=256)
image = np.zeros((2000, 3000, 3), dtype=np.uint8)
restorer.restore([image[:300, :300]], ["haze"])
restorer.memory_budget_bytes = 1
print(peak_bytes(lambda: restorer.restore([image], ["haze"])) / 6e6)
"""
    command = [sys.executable, "-c", script, str(write_tiny_model(tmp_path / "tiny.safetensors"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert 24 < float(done.stdout) < 36


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set up")
def test_freed_memory_is_given_back_or_kept_for_the_next_image():
    script = """
import resource
import numpy as np
from models.memory import keep_freed_memory, return_freed_memory
for choose in (return_freed_memory, keep_freed_memory):
    choose()
    faults = []
    for _ in range(3):
        blocks = [np.ones(1 << 20, dtype=np.uint8) for _ in range(80)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(faults[2] - faults[1])
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    returned, kept = map(int, done.stdout.split())
    pages = 80 * (1 << 20) // 4096
    assert returned > 0.9 * pages
    assert kept < 0.1 * pages
