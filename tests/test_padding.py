import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.padding import pad, padded_size

sides = st.integers(1, 40)


@settings(deadline=None)
@given(height=sides, width=sides, multiple=st.sampled_from([8, 16]))
def test_pad_then_crop_is_identity_and_mirrors_as_numpy_does(height, width, multiple):
    image = torch.arange(float(3 * height * width)).view(3, height, width)
    tall, wide = padded_size(height, width, multiple)
    padded = pad(image, tall, wide)
    assert torch.equal(padded[:, :height, :width], image)
    expected = np.pad(image.numpy(), ((0, 0), (0, tall - height), (0, wide - width)), mode="symmetric")
    assert np.array_equal(padded.numpy(), expected)


@settings(deadline=None)
@given(height=sides, width=sides, multiple=st.integers(1, 32))
def test_padded_size_is_the_smallest_multiple_that_holds_the_image(height, width, multiple):
    for side, padded in zip((height, width), padded_size(height, width, multiple), strict=True):
        assert padded % multiple == 0
        assert padded - multiple < side <= padded


def test_a_single_pixel_fills_any_size():
    assert torch.equal(pad(torch.tensor([[[0.25]]]), 16, 8), torch.full((1, 16, 8), 0.25))
