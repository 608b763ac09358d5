import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.padding import pad_into, padded_size

sides = st.integers(1, 40)


@settings(deadline=None)
@given(height=sides, width=sides, multiple=st.sampled_from([8, 16]))
def test_pad_then_crop_is_identity_and_mirrors_as_numpy_does(height, width, multiple):
    image = np.arange(3 * height * width, dtype=np.uint16).reshape(height, width, 3)
    tall, wide = padded_size(height, width, multiple)
    room = np.empty((tall, wide, 3), np.uint16)
    pad_into(room, image)
    assert np.array_equal(room[:height, :width], image)
    assert np.array_equal(room, np.pad(image, ((0, tall - height), (0, wide - width), (0, 0)), mode="symmetric"))


@settings(deadline=None)
@given(height=sides, width=sides, multiple=st.integers(1, 32))
def test_padded_size_is_the_smallest_multiple_that_holds_the_image(height, width, multiple):
    for side, padded in zip((height, width), padded_size(height, width, multiple), strict=True):
        assert padded % multiple == 0
        assert padded - multiple < side <= padded


def test_a_single_pixel_fills_any_size():
    room = np.empty((16, 8, 1), np.float32)
    pad_into(room, np.array([[[0.25]]], np.float32))
    assert (room == 0.25).all()
