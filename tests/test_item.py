import errno
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import item as item_module
from pipeline.item import Item, SourceGoneError, is_of_machine
from pipeline.records import ImageRef, Stage, Status
from pipeline.sink import OtherRunError
from pipeline.stages import measure_result

SIZE = {"width": 30, "height": 20}


@pytest.fixture
def item() -> Item:
    return Item(ImageRef("id", "a.png", "file:///a.png", 0, None), {}, status=Status.RESTORED)


@pytest.mark.parametrize(
    ("error", "stage", "stops"),
    [
        (SourceGoneError("gone"), Stage.FETCH, True),
        (OtherRunError("gone"), Stage.WRITE, True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), Stage.RESTORE, True),
        (OSError(errno.ENOSPC, "full"), Stage.WRITE, True),
        (OSError(errno.ENOSPC, "full"), Stage.FETCH, False),
        (OSError(errno.ENAMETOOLONG, "long"), Stage.WRITE, False),
        (ValueError("wrong"), Stage.WRITE, False),
    ],
)
def test_what_is_no_images_fault_stops_the_work(item: Item, error: Exception, stage: Stage, stops: bool) -> None:
    assert is_of_machine(error, stage) == stops
    with pytest.raises(type(error)) if stops else item.stage(Stage.ENCODE), item.stage(stage):
        raise error
    assert item.has_failed != stops


@pytest.mark.parametrize(
    ("error", "size", "error_class", "message"),
    [
        (MemoryError(), {}, "out_of_memory", "memory ran out while this image was read"),
        (MemoryError("9 GB"), SIZE, "out_of_memory", "memory ran out for this 30 x 20 image alone: 9 GB"),
        (OSError("no code"), {}, "OSError", "no code"),
        (PermissionError(errno.EACCES, "denied", "a.png"), {}, "PermissionError", "denied: a.png"),
        (OSError(errno.EXDEV, "device", ".a.partial", None, "a.png"), {}, "OSError", "device: a.png"),
        (OSError(errno.ENAMETOOLONG, "long"), {}, "name_too_long", "long"),
        (ValueError(), {}, "ValueError", "ValueError"),
    ],
)
def test_a_fault_is_told(item: Item, error: Exception, size: dict[str, int], error_class: str, message: str) -> None:
    item.facts.update(size, psnr_db=30.0)
    item.fail(Stage.RESTORE, error)
    assert item.status is Status.FAILED
    assert item.facts == size | {"stage": Stage.RESTORE, "error_class": error_class, "error_message": message}


def test_a_stages_time_is_in_milliseconds_and_adds_up(item: Item, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.25, 20.0, 20.5])
    monkeypatch.setattr(item_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    for _ in range(2):
        with item.stage(Stage.DECODE):
            pass
    assert item.facts == {"decode_ms": 750.0}


@pytest.mark.parametrize(
    ("clipped_before", "clipped_after", "change", "suspicious"),
    [(0, 30, 0, True), (30, 30, 0, False), (30, 60, 0, True), (0, 10, 0, False), (0, 0, 101, True), (0, 0, 99, False)],
)
def test_results_that_clip_more_than_their_input_or_change_much_are_suspicious(
    item: Item, clipped_before: int, clipped_after: int, change: int, suspicious: bool
) -> None:
    """Clipped rows of a hundred; the rest is grey."""
    before = np.full((100, 10, 3), 80, np.uint8)
    after = before + np.uint8(change)
    before[:clipped_before] = 255
    after[:clipped_after] = 255
    item.view, item.restored = before, after
    measure_result(item)
    assert item.facts["suspicious"] == suspicious
    assert item.facts["clipped_fraction"] == pytest.approx(clipped_after / 100)
