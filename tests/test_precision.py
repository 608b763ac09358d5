import pytest
import torch

from jobs import display
from jobs.networks import resolve_dtype
from jobs.training_loop import mixed_precision
from models.precision import fastest_dtype

AVX2 = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("device", "capabilities", "wanted"),
    [
        ("cpu", AVX2, torch.float32),
        ("cpu", {}, torch.float32),
        ("cpu", AVX2 | {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", AVX2 | {"amx_bf16": True}, torch.bfloat16),
        ("cuda", AVX2, torch.bfloat16),
    ],
)
def test_bfloat16_is_chosen_where_the_hardware_has_it(monkeypatch, device, capabilities, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastest_dtype(device) is wanted
    assert resolve_dtype("auto", device) == str(wanted).removeprefix("torch.")
    assert resolve_dtype("bfloat16", device) == "bfloat16"


@pytest.mark.parametrize(("native", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_training_multiplies_in_what_is_fastest(monkeypatch, native, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": native})
    matrix = torch.ones(4, 4)
    with mixed_precision(torch.device("cpu")):
        assert (matrix @ matrix).dtype is wanted


def test_a_run_says_where_its_precision_is_the_slower_one(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX2)
    assert "float32 is faster here" in display._precision("bfloat16", "cpu")
    assert display._precision("float32", "cpu") == "float32"
    assert display._precision("bfloat16", "cuda") == "bfloat16"


@pytest.mark.parametrize(("native", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_is_asked_whether_it_emulates(monkeypatch, native, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert fastest_dtype("cuda") is wanted
