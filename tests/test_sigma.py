import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from classifier.sigma import estimate_sigma
from pipeline.point_spread import smooth_field

CBSD68 = Path(__file__).parents[2] / "shared" / "data" / "test" / "cbsd68"


def scene(seed=0, height=240, width=320):
    """Smooth shading with hard edges and stripes, levels about 40..215."""
    rng = np.random.default_rng(seed)
    shading = np.stack([smooth_field(height, width, rng) for _ in range(3)], axis=2)
    shapes = smooth_field(height, width, rng, cells=7)[:, :, None]
    stripes = (np.sin(np.arange(width) / 3)[None, :, None] > 0) * (shapes > 0.7)
    return 40 + 110 * shading + 40 * (shapes > 0.5) + 25 * stripes


def noisy(image, sigma_255, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma_255, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("sigma_255", [5, 10, 15, 25, 35, 50, 55])
def test_sigma_is_found_within_a_tenth(sigma_255):
    for seed in range(3):
        assert estimate_sigma(noisy(scene(seed), sigma_255, seed)) == pytest.approx(sigma_255, rel=0.1)


def test_clean_scenes_are_near_zero():
    assert estimate_sigma(noisy(scene(), 0)) < 1.5


@pytest.mark.parametrize("level", [0, 20, 255])
def test_flat_images_have_no_noise(level):
    assert estimate_sigma(np.full((60, 80, 3), level, np.uint8)) == 0


@pytest.mark.parametrize("sigma_255", [20, 30, 45])
def test_noise_of_a_grey_picture_counts_as_that_of_all_colours_with_as_much_in_brightness(sigma_255):
    grey = np.repeat(scene()[:, :, :1], 3, axis=2)
    noise = np.random.default_rng(0).normal(0, sigma_255, (*grey.shape[:2], 1))
    image = np.clip(grey + noise, 0, 255).astype(np.uint8)
    assert estimate_sigma(image) == pytest.approx(1.5 * sigma_255, rel=0.1)


@pytest.mark.parametrize("sigma_255", [25, 45])
def test_noise_is_found_where_a_jpeg_has_smoothed_the_colours(sigma_255):
    buffer = io.BytesIO()
    Image.fromarray(noisy(scene(), sigma_255)).save(buffer, "JPEG", quality=92)  # 4:2:0
    image = np.asarray(Image.open(buffer))
    assert estimate_sigma(image) == pytest.approx(sigma_255, rel=0.15)
    assert estimate_sigma(np.asarray(Image.fromarray(image).convert("L").convert("RGB"))) > 0.8 * sigma_255


@pytest.mark.parametrize("side", [40, 49, 64, 96])
def test_small_images_give_patches_enough(side):
    image = noisy(scene(2), 25)
    parts = [image[top : top + side, left : left + side] for top in (0, 60, 120) for left in (0, 80, 160, 220)]
    assert np.mean([estimate_sigma(part) for part in parts]) == pytest.approx(25, rel=0.08)


def test_clipped_noise_is_made_up_for():
    dark = np.full((200, 200, 3), 12.0)
    image = noisy(dark, 20)
    assert image.astype(float).std() < 16
    assert estimate_sigma(image) == pytest.approx(20, rel=0.15)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (4, 4), (5, 5), (5, 300), (11, 7)])
def test_any_size_gives_a_finite_number(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.isfinite(estimate_sigma(image))


def test_estimate_grows_with_the_noise():
    estimates = [estimate_sigma(noisy(scene(), sigma)) for sigma in (2, 6, 12, 20, 30, 45, 60)]
    assert estimates == sorted(estimates)


def test_a_large_image_agrees_with_its_part():
    image = noisy(np.tile(scene(), (5, 5, 1)), 25)
    assert estimate_sigma(image) == pytest.approx(estimate_sigma(image[:240, :320]), rel=0.05)


@pytest.mark.parametrize("sigma_255", [15, 25, 50])
def test_cbsd68_within_a_tenth(sigma_255):
    if not CBSD68.is_dir():
        pytest.skip("../shared/data is not there")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(CBSD68.iterdir())]
    estimates = np.array([estimate_sigma(noisy(image, sigma_255, seed)) for seed, image in enumerate(images)])
    assert np.abs(estimates / sigma_255 - 1).max() <= 0.1
