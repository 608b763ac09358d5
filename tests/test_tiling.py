from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tiling import overlap_for, run_tiled, spans


@settings(deadline=None)
@given(
    length=st.integers(1, 60), tile=st.integers(2, 12), multiple=st.sampled_from([4, 8, 16]), share=st.integers(1, 11)
)
def test_spans_cover_the_axis_with_weights_that_sum_to_one(length, tile, multiple, share):
    overlap_px = min(share, tile - 1) * multiple
    found = spans(length * multiple, tile_px=tile * multiple, overlap_px=overlap_px, multiple=multiple)
    total = torch.zeros(length * multiple)
    for span in found:
        assert span.start % multiple == 0
        assert overlap_px < span.length <= min(tile, length) * multiple or span.length == length * multiple
        assert (span.weights > 0).all()
        total[span.slice] += span.weights
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)
    for before, after in pairwise(found):
        assert before.start < after.start <= before.start + before.length - overlap_px
        assert before.length == after.length


@settings(deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), tile=st.integers(2, 6), limit=st.integers(1, 5))
def test_the_identity_passes_through_tiles(height, width, tile, limit):
    image = torch.rand(3, 8 * height, 8 * width)
    calls = []

    def restore(batch):
        calls.append(tuple(batch.shape))
        return batch

    out = run_tiled(image, restore, tile_px=8 * tile, multiple=8, batch_limit=limit)
    assert torch.allclose(out, image, atol=1e-6)
    assert all(shape[0] <= limit for shape in calls)
    ((_, tile_height, tile_width),) = {shape[1:] for shape in calls}
    assert tile_height <= 8 * min(tile, height)
    assert tile_width <= 8 * min(tile, width)


def test_neighbouring_tiles_fade_into_each_other():
    """Tiles that disagree by a constant leave no step larger than the ramp's."""
    image = torch.zeros(1, 16, 112)
    levels = iter((0.0, 1.0))
    out = run_tiled(image, lambda batch: torch.full_like(batch, next(levels)), tile_px=64, multiple=8, batch_limit=1)
    steps = out[0, 0].diff()
    assert (steps >= -1e-6).all()
    assert steps.max() < 2 / overlap_for(64, 8)
    assert (out[0, 0, 0], out[0, 0, -1]) == (0, 1)


@pytest.mark.parametrize(("tile_px", "multiple", "expected"), [(16, 8, 8), (256, 8, 32), (1024, 16, 64), (96, 16, 16)])
def test_overlap_is_a_multiple_below_the_tile(tile_px, multiple, expected):
    assert overlap_for(tile_px, multiple) == expected


def test_tiles_are_no_larger_than_their_number_needs():
    found = spans(1376, tile_px=512, overlap_px=64, multiple=16)
    assert [(span.start, span.length) for span in found] == [(0, 512), (432, 512), (864, 512)]
    assert [span.length for span in spans(768, tile_px=512, overlap_px=64, multiple=16)] == [416, 416]
