import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier.labels import CLEAN_LIMITS, LABELS, Degradation
from pipeline import synthesis
from pipeline.synthesis import (
    add_camera_noise,
    add_deep_shadow,
    add_haze,
    add_jpeg,
    add_lowlight,
    add_motion_blur,
    add_noise,
    add_rain,
    convolve,
    degrade,
    disk_kernel,
    draw_noise_sigma,
    gaussian_kernel,
    line_kernel,
    pseudo_depth,
    resize,
    sky,
    smooth_field,
    spread_px,
    to_linear,
    to_srgb,
    to_uint8,
    trajectory_kernel,
    vary_clean,
)


def photograph(height=90, width=120, seed=0):
    """A textured scene, H x W x 3 float32 in [0.05, 0.95]."""
    rng = np.random.default_rng(seed)
    texture = rng.random((height, width, 3), dtype=np.float32)
    shading = np.stack([smooth_field(height, width, rng) for _ in range(3)], axis=2)
    return np.clip(0.15 + 0.6 * shading + 0.2 * (texture - 0.5), 0.05, 0.95).astype(np.float32)


@pytest.mark.parametrize("label", LABELS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(16, 70), width=st.integers(16, 70))
def test_every_degradation_keeps_size_type_and_range(label, seed, height, width):
    clean = photograph(height, width)
    before = clean.copy()
    out, sigma_255 = degrade(clean, label, np.random.default_rng(seed))
    assert out.shape == clean.shape
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert out.min() >= 0
    assert out.max() <= 1
    assert (sigma_255 is not None) == (label is Degradation.NOISE)
    np.testing.assert_array_equal(clean, before)


@pytest.mark.parametrize("label", LABELS)
def test_the_seed_decides_everything(label):
    clean = photograph()
    first, second = (degrade(clean, label, np.random.default_rng(5))[0] for _ in range(2))
    other = degrade(clean, label, np.random.default_rng(6))[0]
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0


# Convolution


def convolved_by_sums(image, kernel):
    """The definition: a sum over kernel taps of shifted, mirrored images."""
    above, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(
        image, ((kernel.shape[0], kernel.shape[0]), (kernel.shape[1], kernel.shape[1]), (0, 0)), "symmetric"
    )
    out = np.zeros_like(image)
    for i, j in np.ndindex(kernel.shape):
        top, start = kernel.shape[0] - (i - above), kernel.shape[1] - (j - left)
        out += kernel[i, j] * padded[top : top + image.shape[0], start : start + image.shape[1]]
    return out


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (1, 7), (4, 6)])
def test_convolution_is_its_definition(shape):
    image = photograph(23, 31)
    kernel = np.random.default_rng(1).random(shape)
    kernel /= kernel.sum()
    np.testing.assert_allclose(convolve(image, kernel), convolved_by_sums(image, kernel), atol=1e-5)


def test_convolution_with_a_single_tap_is_identity():
    image = photograph(20, 30)
    np.testing.assert_allclose(convolve(image, np.ones((1, 1))), image, atol=1e-6)


def test_convolution_keeps_a_flat_image():
    image = np.full((40, 50, 3), 0.3, np.float32)
    np.testing.assert_allclose(convolve(image, disk_kernel(6)), image, atol=1e-6)


@pytest.mark.parametrize("kernel", [gaussian_kernel(1.3), disk_kernel(4.5)], ids=["gaussian", "disk"])
def test_kernels_sum_to_one_and_are_symmetric(kernel):
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-7)
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-7)


def test_a_gaussian_has_the_width_asked_for():
    assert spread_px(gaussian_kernel(2.0)) == pytest.approx(2.0, rel=0.03)


# Each kind of damage


def test_noise_has_the_sigma_asked_for():
    clean = np.full((200, 200, 3), 0.5, np.float32)
    for sigma_255 in (5, 25):
        noise = add_noise(clean, np.random.default_rng(0), sigma_255=sigma_255) - clean
        assert float(noise.std()) * 255 == pytest.approx(sigma_255, rel=0.02)


def test_camera_noise_has_the_sigma_asked_for_and_grows_with_the_light():
    halves = np.full((200, 200, 3), 0.2, np.float32)
    halves[:, 100:] = 0.7
    for seed in range(6):
        noisy = add_camera_noise(halves, np.random.default_rng(seed), sigma_255=10)
        assert float((noisy - halves).std()) * 255 == pytest.approx(10, rel=0.05)
        light = to_linear(noisy)
        assert light[:, 110:].std() > 1.3 * light[:, :90].std()


def test_light_and_display_are_each_others_inverse():
    levels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16, 1)
    np.testing.assert_allclose(to_srgb(to_linear(levels)), levels, atol=1e-5)
    assert to_linear(np.float32([0.5]))[0] == pytest.approx(0.214, abs=1e-3)


def test_noise_is_drawn_beyond_the_clean_limit():
    rng = np.random.default_rng(0)
    drawn = [draw_noise_sigma(rng) for _ in range(500)]
    assert CLEAN_LIMITS.noise_sigma_255 <= min(drawn) < 8
    assert 50 < max(drawn) <= 55


@pytest.mark.parametrize("angle_deg", [0, 30, 90])
def test_a_streak_lies_along_its_angle(angle_deg):
    kernel = line_kernel(30, angle_deg, 1.5)
    assert kernel.max() == pytest.approx(1)
    assert spread_px(kernel) == pytest.approx(30 / np.sqrt(12), rel=0.1)
    y, x = np.mgrid[: kernel.shape[0], : kernel.shape[1]] - (kernel.shape[0] - 1) / 2
    along = x * np.sin(np.deg2rad(angle_deg)) + y * np.cos(np.deg2rad(angle_deg))
    across = x * np.cos(np.deg2rad(angle_deg)) - y * np.sin(np.deg2rad(angle_deg))
    assert (kernel * along**2).sum() > 20 * (kernel * across**2).sum()


def test_rain_only_brightens_a_dark_scene():
    dark = photograph() * np.float32(0.5)
    rainy = add_rain(dark, np.random.default_rng(0))
    assert float((rainy - dark).min()) >= -1e-4
    assert float((rainy - dark).max()) > 0.1


def test_a_veil_comes_with_streaks_only():
    white = np.ones((60, 60, 3), np.float32)
    assert min(float(add_rain(white, np.random.default_rng(seed)).min()) for seed in range(40)) > 0.99
    grey = np.full((60, 60, 3), 0.3, np.float32)
    clearest = [float(add_rain(grey, np.random.default_rng(seed)).min()) for seed in range(40)]
    assert 2 <= sum(least > 0.305 for least in clearest) <= 25


def test_some_haze_leaves_the_foreground_clear():
    black = np.zeros((60, 60, 3), np.float32)
    hazy = [add_haze(black, np.random.default_rng(seed), clear_foregrounds=True) for seed in range(60)]
    clear = [image for image in hazy if image.min() < 0.1]
    assert 5 <= len(clear) <= 30
    assert any(image.max() > 0.5 for image in clear)


def test_coarser_camera_noise_joins_neighbouring_pixels():
    grey = np.full((80, 80, 3), 0.5, np.float32)

    def likeness(coarsest_px):
        found = []
        for seed in range(20):
            noise = add_camera_noise(grey, np.random.default_rng(seed), sigma_255=10, coarsest_px=coarsest_px) - grey
            found.append(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1])
        return np.mean(found)

    assert likeness(1.3) > likeness(0.8) + 0.1


def test_haze_lies_between_the_scene_and_its_airlight():
    clean = photograph()
    for seed in range(20):
        hazy = add_haze(clean, np.random.default_rng(seed))
        assert hazy.std() < clean.std()
        assert hazy.mean() > clean.mean()


def test_sky_is_bright_smooth_and_reaches_the_top():
    scene = np.full((90, 90, 3), 0.2, np.float32)
    scene[:40] = 0.9
    scene[:40, 60:] += np.random.default_rng(0).uniform(-0.3, 0.1, (40, 30, 3)).astype(np.float32)
    scene[60:80, 10:50] = 0.9
    found = sky(scene)
    assert found[5:30, 10:50].min() > 0.9
    assert found[5:30, 70:].max() < 0.1  # rough: leaves against the light
    assert found[62:78, 12:48].max() < 0.1  # below dark ground: a white wall


def test_a_tint_colours_the_airlight():
    grey = np.full((60, 60, 3), 0.4, np.float32)
    colour = {
        tint: max(np.ptp(add_haze(grey, np.random.default_rng(s), tint=tint).mean(axis=(0, 1))) for s in range(10))
        for tint in (0.0, 0.12)
    }
    assert colour[0.0] < 0.01 < 0.05 < colour[0.12]


def test_depth_and_fields_stay_in_their_range():
    rng = np.random.default_rng(0)
    for _ in range(20):
        for field in (pseudo_depth(30, 50, rng), smooth_field(30, 50, rng)):
            assert field.shape == (30, 50)
            assert field.min() >= 0
            assert field.max() <= 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length_px=st.floats(2, 60))
def test_a_trajectory_sums_to_one_and_is_no_longer_than_its_path(seed, length_px):
    kernel = trajectory_kernel(np.random.default_rng(seed), length_px=length_px)
    assert kernel.sum() == pytest.approx(1, abs=1e-4)
    assert kernel.min() >= 0
    assert spread_px(kernel) <= length_px / 2 + 1


def test_motion_blur_removes_fine_texture():
    clean = photograph()
    for seed in range(10):
        blurred = add_motion_blur(clean, np.random.default_rng(seed))
        assert np.abs(np.diff(blurred, axis=1)).mean() < 0.6 * np.abs(np.diff(clean, axis=1)).mean()


def test_low_light_is_darker_than_the_clean_limit():
    clean = photograph()
    for seed in range(20):
        dark = add_lowlight(clean, np.random.default_rng(seed))
        assert dark.mean() < CLEAN_LIMITS.exposure * clean.mean()


def test_low_light_may_shift_the_white_balance_by_a_tenth():
    grey = np.full((60, 60, 3), 0.8, np.float32)
    colours = [add_lowlight(grey, np.random.default_rng(seed)).mean(axis=(0, 1)) for seed in range(30)]
    ratios = np.array([red / blue for red, _, blue in colours])
    assert 0.78 < ratios.min() < 0.95
    assert 1.05 < ratios.max() < 1.28


def test_deep_shadow_keeps_the_lit_part_and_darkens_the_rest():
    window = np.full((80, 80, 3), 0.3, np.float32)
    window[30:50, 30:50] = 0.95
    for seed in range(20):
        dark = add_deep_shadow(window, np.random.default_rng(seed))
        assert dark.mean() < CLEAN_LIMITS.exposure * window.mean()
        assert dark[38:42, 38:42].mean() > 3 * dark[:8, :8].mean()


def test_jpeg_errs_more_at_lower_quality():
    clean = photograph()
    errors = [float(np.abs(add_jpeg(clean, quality=quality) - clean).mean()) for quality in (95, 60, 20, 5)]
    assert errors == sorted(errors)


def test_clean_variants_keep_to_the_clean_limits():
    bright = photograph()
    dark, black = bright * np.float32(0.2), np.zeros_like(bright)
    for seed in range(150):
        for clean in (bright, dark):
            varied = vary_clean(clean, np.random.default_rng(seed))
            assert varied.mean() > CLEAN_LIMITS.exposure * clean.mean()
            assert np.abs(varied - clean).mean() < 0.2
        # What a black picture shows is light that was scattered into it, and a little grain.
        assert vary_clean(black, np.random.default_rng(seed)).mean() < 1 - CLEAN_LIMITS.transmission + 0.006


def test_clean_variants_of_hard_edges_are_finite():
    """Filters overshoot at edges between black and white."""
    edges = np.zeros((60, 60, 3), np.float32)
    edges[:, 20:40] = 1
    for seed in range(60):
        assert np.isfinite(vary_clean(edges, np.random.default_rng(seed))).all()


def test_resize_keeps_a_flat_image_and_gives_the_size():
    out = resize(np.full((40, 30, 3), 0.25, np.float32), 20, 50)
    assert out.shape == (20, 50, 3)
    np.testing.assert_allclose(out, 0.25, atol=1e-5)


def test_to_uint8_rounds_and_clips():
    levels = np.array([[[-0.1, 0.0, 0.5 / 255]], [[0.51 / 255, 254.6 / 255, 1.2]]], np.float32)
    np.testing.assert_array_equal(to_uint8(levels).ravel(), [0, 0, 0, 1, 255, 255])


def test_motion_blur_spreads_beyond_what_counts_as_clean(monkeypatch):
    monkeypatch.setattr(synthesis, "add_noise", lambda image, rng, *, sigma_255: image)
    point = np.zeros((121, 121, 3), np.float32)
    point[60, 60] = 1
    for seed in range(100):
        spread = add_motion_blur(point, np.random.default_rng(seed), wander=4.0).mean(axis=2).clip(0)
        assert spread_px(spread) >= 1.39 * CLEAN_LIMITS.blur_px, seed


def test_the_spread_of_a_kernel():
    assert spread_px(gaussian_kernel(2.0)) == pytest.approx(2.0, rel=0.02)
    line = np.zeros((3, 13))
    line[1] = 1
    assert spread_px(line) == pytest.approx(np.sqrt((13**2 - 1) / 12))
