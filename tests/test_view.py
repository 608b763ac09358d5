import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from classifier.view import ViewSettings, _contrasts, native_crops, take_views, thumbnail


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 5))
def test_views_have_their_sizes_whatever_the_image(height, width, crops):
    view = ViewSettings(crop_px=32, crops=crops, thumbnail_px=24)
    views = take_views(random_image(height, width), view)
    assert views.crops.shape == (1 if max(height, width) <= 32 else crops, 32, 32, 3)
    assert views.thumbnail.shape == (24, 24, 3)
    assert views.crops.dtype == views.thumbnail.dtype == np.uint8


def test_crops_are_native_pixels():
    image = random_image(100, 140)
    places = {image[top : top + 32, left : left + 32].tobytes() for top in range(100 - 31) for left in range(140 - 31)}
    assert all(crop.tobytes() in places for crop in native_crops(image, ViewSettings(32, 4, 24)))


def test_crops_are_the_same_each_time():
    image = random_image(90, 200)
    view = ViewSettings(32, 4, 24)
    np.testing.assert_array_equal(native_crops(image, view), native_crops(image, view))


def test_crops_go_from_texture_to_flat():
    image = np.full((128, 256, 3), 128, np.uint8)
    image[:, 128:] = random_image(128, 128)
    crops = native_crops(image, ViewSettings(32, 2, 24))
    assert crops[0].std() > 50
    assert crops[-1].std() == 0


def test_an_image_of_the_size_of_a_crop_is_its_crop():
    image = random_image(32, 32)
    crops = native_crops(image, ViewSettings(32, 3, 24))
    for crop in crops:
        np.testing.assert_array_equal(crop, image)


def test_small_images_are_mirrored_up():
    image = random_image(5, 40)
    crop = native_crops(image, ViewSettings(32, 1, 24))[0]
    np.testing.assert_array_equal(crop[5:10], crop[:5][::-1])
    view = ViewSettings(32, 1, 24)
    smalls = [take_views(random_image(*size), view).small for size in ((31, 32), (32, 31), (5, 400), (32, 32))]
    assert smalls == [True, True, True, False]


def test_thumbnail_keeps_the_mean_of_the_whole_image():
    image = np.zeros((300, 400, 3), np.uint8)
    image[:, 200:] = 200
    small = thumbnail(image, 32)
    assert abs(float(small.mean()) - 100) < 2
    assert small[:, :14].max() == 0
    assert small[:, 18:].min() == 200


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (96, 96), (300, 400), (500, 40)])
def test_thumbnail_averages_as_pillow_does(size):
    image = random_image(*size)
    expected = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.BILINEAR))
    assert np.abs(thumbnail(image, 96).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
    ids=["grey", "alpha", "float", "empty"],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="H x W x 3 uint8"):
        take_views(image, ViewSettings())


def test_settings_without_crops_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        ViewSettings(crops=0)


@pytest.mark.parametrize("px", [1, 30, 32])
def test_contrasts_are_those_of_a_plain_loop_over_the_windows(px):
    image = random_image(61, 90)
    tops, lefts = np.array([0, 7, 61 - px]), np.array([0, 13, 90 - px])
    expected = []
    for top in tops:
        for left in lefts:
            green = image[top : top + px : 4, left : left + px, 1].astype(float)
            expected.append(np.abs(np.diff(green, axis=1)).mean() if px > 1 else 0.0)
    np.testing.assert_allclose(_contrasts(image, tops, lefts, px), expected)
