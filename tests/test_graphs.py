"""Which calls are recorded and replayed; the recording itself needs a GPU."""

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from synthetic_weights import tiny_network

from models import graphs, orthogonal_bank
from models.graphs import Recorded, parts
from models.inference import InferenceDFPIR

PROMPT = torch.tensor([0])


def told(image, prompts):
    """Twice an image, and its prompt."""
    return 2 * image + prompts[:, None, None, None]


class Counted:
    """Says `told` and counts its calls; records itself as a function that is off by `error`."""

    def __init__(self, error=0.0, fault=None):
        self.calls, self.recorded, self.error, self.fault = 0, 0, error, fault
        self.full = 0
        """So many calls from now on find memory full."""

    def __call__(self, image, prompts):
        self.calls += 1
        if self.full:
            self.full -= 1
            raise torch.OutOfMemoryError
        return told(image, prompts)

    def record(self, forward, image, prompts, beside):
        if self.fault:
            raise self.fault
        self.recorded += 1
        return lambda image, prompts: told(image, prompts) + self.error


def image(side):
    return torch.rand(1, 3, side, side)


def test_a_shape_is_recorded_once_it_has_come_often_and_replayed_from_then_on():
    counted = Counted()
    recorded = Recorded(counted, record=counted.record)
    for calls, records in [(1, 0), (2, 0), (3, 1), (3, 1), (3, 1)]:
        given = image(8)
        assert torch.equal(recorded(given, PROMPT), 2 * given)
        assert (counted.calls, counted.recorded) == (calls, records)
    recorded(image(9), PROMPT)
    assert (counted.calls, counted.recorded) == (4, 1)


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(1, 100, [1]), (13, 100, [8, 4, 1]), (19, 8, [8, 8, 2, 1]), (7, 3, [2, 2, 2, 1]), (3, 1, [1, 1, 1]), (3, 0, [])],
)
def test_batches_of_every_size_are_made_of_few_sizes(count, most, sizes):
    assert parts(count, most=most) == sizes


def test_a_batch_is_replayed_in_parts(monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST_PIXELS", 5 * 64)
    counted = Counted()
    recorded = Recorded(counted, record=counted.record)
    for size in (7, 6, 5, 4):  # 4 + 2 + 1, 4 + 2, 4 + 1, 4
        for _ in range(graphs.RUNS_BEFORE):
            given, prompts = torch.rand(size, 3, 8, 8), torch.arange(size)
            assert torch.equal(recorded(given, prompts), told(given, prompts))
    assert sorted(shape[0] for shape in recorded._recordings) == [1, 2, 4]


def test_a_batch_of_which_no_part_may_be_recorded_runs_whole(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_SHAPES", 1)
    counted = Counted()
    recorded = Recorded(counted, record=counted.record)
    for _ in range(graphs.RUNS_BEFORE + 1):
        recorded(torch.rand(1, 3, 8, 8), PROMPT)
    before = counted.calls
    for size, calls in [(7, 1), (3, 1)]:
        given, prompts = torch.rand(size, 3, 9, 9), torch.arange(size)
        assert torch.equal(recorded(given, prompts), told(given, prompts))
        before += calls
        assert counted.calls == before
    given, prompts = torch.rand(3, 3, 8, 8), torch.arange(3)  # 2, and 1 that is recorded
    assert torch.equal(recorded(given, prompts), told(given, prompts))
    assert counted.calls == before + 1


def test_what_is_large_or_comes_when_there_is_no_more_room_is_not_recorded(monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST_PIXELS", 100)
    monkeypatch.setattr(graphs, "MOST_PIXELS", 150)
    counted = Counted()
    recorded = Recorded(counted, record=counted.record)
    for side, records in [(11, 0), (10, 1), (8, 1), (7, 2), (2, 2)]:
        for _ in range(5):
            recorded(image(side), PROMPT)
        assert counted.recorded == records


def test_there_is_an_end_to_the_number_of_recordings(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_SHAPES", 2)
    counted = Counted()
    recorded = Recorded(counted, record=counted.record)
    for side in (1, 2, 3, 3):
        for _ in range(5):
            recorded(image(side), PROMPT)
    assert counted.recorded == 2


def test_recordings_give_way_to_an_image_that_has_no_room_beside_them():
    counted = Counted()
    recorded = Recorded(counted, record=counted.record)
    for _ in range(5):
        recorded(image(8), PROMPT)
    assert recorded._recordings
    whole, counted.full = counted.calls, 1
    given = image(30)
    assert torch.equal(recorded(given, PROMPT), 2 * given)
    assert (counted.calls, len(recorded._recordings)) == (whole + 2, 0)
    for _ in range(5):
        recorded(image(8), PROMPT)
    assert counted.recorded == 1
    counted.full = 1
    with pytest.raises(torch.OutOfMemoryError):
        recorded(given, PROMPT)


@pytest.mark.parametrize(
    ("counted", "why"),
    [(Counted(error=0.5), "off by 5.0e-01"), (Counted(error=float("nan")), "off by nan"),
     (Counted(fault=RuntimeError("no capture")), "no capture")],
)  # fmt: skip
def test_a_recording_that_is_wrong_or_fails_is_never_used(counted, why):
    recorded = Recorded(counted, record=counted.record)
    for _ in range(graphs.RUNS_BEFORE):
        recorded(image(8), PROMPT)
    with pytest.warns(UserWarning, match=why):
        recorded(image(8), PROMPT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            given = image(8)
            assert torch.equal(recorded(given, PROMPT), 2 * given)


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError(), torch.AcceleratorError("CUDA error: out of memory")])
def test_no_room_for_a_recording_is_no_fault(fault):
    counted = Counted(fault=fault)
    recorded = Recorded(counted, record=counted.record)
    for _ in range(graphs.RUNS_BEFORE + 3):
        recorded(image(8), PROMPT)
    assert counted.calls == graphs.RUNS_BEFORE + 3


def test_threads_take_turns():
    inside = threading.Lock()

    def alone(image, prompts):
        assert inside.acquire(blocking=False)
        time.sleep(0.005)
        inside.release()
        return told(image, prompts)

    recorded = Recorded(alone, record=lambda *_: alone)
    given = [image(8) for _ in range(12)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda each: recorded(each, PROMPT), given))
    assert all(torch.equal(each, 2 * image) for each, image in zip(found, given, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_on_a_gpu_equal_the_network():
    form = InferenceDFPIR(tiny_network(5), orthogonal_bank(), dtype=torch.bfloat16, device="cuda")
    recorded = Recorded(form)
    with torch.inference_mode():
        for number in range(12):
            given = torch.rand(1 + number % 2, 3, 32, 48, device="cuda")
            prompts = torch.full((len(given),), number % 5, device="cuda")
            assert (recorded(given, prompts) - form(given, prompts)).abs().max() <= 1e-3
    assert len(recorded._recordings) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recordings_are_made_while_other_threads_use_the_gpu_and_after_all_others_are_gone():
    stop = threading.Event()

    def others():
        while not stop.is_set():
            assert float((torch.ones(64, 64).to("cuda") @ torch.ones(64, 64, device="cuda")).cpu().sum()) == 64**3

    network = tiny_network(5)
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(others) for _ in range(2)]
        try:
            for _ in range(2):
                form = InferenceDFPIR(network, orthogonal_bank(), dtype=torch.float32, device="cuda")
                recorded = Recorded(form)
                with torch.inference_mode():
                    for number in range(12):
                        given = torch.rand(1 + number % 2, 3, 32, 48, device="cuda")
                        prompts = torch.zeros(len(given), dtype=torch.int64, device="cuda")
                        assert (recorded(given, prompts) - form(given, prompts)).abs().max() <= 1e-3
                assert len(recorded._recordings) == 2
                del recorded
        finally:
            stop.set()
        for future in futures:
            future.result()
