from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier.labels import CLEAN_LIMITS, LABELS, Degradation
from pipeline.degradations import CameraNoise, DeepShadow, Haze, LowLight, MotionBlur, Noise, Rain
from pipeline.point_spread import smooth_field, spread_px
from pipeline.synthesis import (
    add_jpeg,
    add_other,
    damaged,
    draw_noise_sigma,
    draw_recipe,
    resize,
    to_uint8,
    vary_clean,
    well_exposed,
)


def photograph(height=90, width=120, seed=0):
    """A textured scene, H x W x 3 float32 in [0.05, 0.95]."""
    rng = np.random.default_rng(seed)
    texture = rng.random((height, width, 3), dtype=np.float32)
    shading = np.stack([smooth_field(height, width, rng) for _ in range(3)], axis=2)
    return np.clip(0.15 + 0.6 * shading + 0.2 * (texture - 0.5), 0.05, 0.95).astype(np.float32)


def degraded(clean, label, seed):
    rng = np.random.default_rng(seed)
    if label in (Degradation.OTHER, Degradation.CLEAN):
        return (add_other if label is Degradation.OTHER else vary_clean)(clean, rng)
    return damaged(clean, draw_recipe(label, rng, *clean.shape[:2]))


@pytest.mark.parametrize("label", LABELS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(16, 70), width=st.integers(16, 70))
def test_every_degradation_keeps_size_type_and_range(label, seed, height, width):
    clean = photograph(height, width)
    before = clean.copy()
    out = degraded(clean, label, seed)
    assert out.shape == clean.shape
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert out.min() >= 0
    assert out.max() <= 1
    np.testing.assert_array_equal(clean, before)


@pytest.mark.parametrize("label", LABELS)
def test_the_seed_decides_everything(label):
    clean = photograph()
    first, second = (degraded(clean, label, 5) for _ in range(2))
    other = degraded(clean, label, 6)
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0


# Each kind of damage


def test_noise_has_the_sigma_asked_for():
    clean = np.full((200, 200, 3), 0.5, np.float32)
    for sigma_255 in (5, 25):
        noise = damaged(clean, Noise.draw(np.random.default_rng(0), sigma_255=sigma_255)) - clean
        assert float(noise.std()) * 255 == pytest.approx(sigma_255, rel=0.02)


def test_camera_noise_has_the_sigma_asked_for_and_grows_with_the_light():
    halves = np.full((200, 200, 3), 0.2, np.float32)
    halves[:, 100:] = 0.7
    for seed in range(6):
        noisy = damaged(halves, CameraNoise.draw(np.random.default_rng(seed), sigma_255=10))
        assert float((noisy - halves).std()) * 255 == pytest.approx(10, rel=0.05)
        light = np.clip(noisy, 0, 1) ** 2.2
        assert light[:, 110:].std() > 1.3 * light[:, :90].std()


def test_noise_is_drawn_beyond_the_clean_limit():
    rng = np.random.default_rng(0)
    drawn = [draw_noise_sigma(rng) for _ in range(500)]
    assert CLEAN_LIMITS.noise_sigma_255 <= min(drawn) < 8
    assert 50 < max(drawn) <= 55


def test_rain_only_brightens_a_dark_scene():
    dark = photograph() * np.float32(0.5)
    rainy = damaged(dark, Rain.draw(np.random.default_rng(0), *dark.shape[:2]))
    assert float((rainy - dark).min()) >= -1e-4
    assert float((rainy - dark).max()) > 0.1


def test_a_veil_comes_with_streaks_only():
    white = np.ones((60, 60, 3), np.float32)
    assert (
        min(float(damaged(white, Rain.draw(np.random.default_rng(seed), *white.shape[:2])).min()) for seed in range(40))
        > 0.99
    )
    grey = np.full((60, 60, 3), 0.3, np.float32)
    clearest = [
        float(damaged(grey, Rain.draw(np.random.default_rng(seed), *grey.shape[:2])).min()) for seed in range(40)
    ]
    assert 2 <= sum(least > 0.305 for least in clearest) <= 25


def test_some_haze_leaves_the_foreground_clear():
    black = np.zeros((60, 60, 3), np.float32)
    hazy = [damaged(black, Haze.draw(np.random.default_rng(seed), 60, 60)) for seed in range(600)]
    clear = [image for image in hazy if image.min() < 0.1]
    assert 50 <= len(clear) <= 300
    assert any(image.max() > 0.5 for image in clear)


def test_coarser_camera_noise_joins_neighbouring_pixels():
    grey = np.full((80, 80, 3), 0.5, np.float32)

    def likeness(coarsest_px):
        found = []
        for seed in range(20):
            recipe = CameraNoise.draw(np.random.default_rng(seed), sigma_255=10, coarsest_px=coarsest_px)
            noise = damaged(grey, recipe) - grey
            found.append(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1])
        return np.mean(found)

    assert likeness(1.3) > likeness(0.8) + 0.1


def test_haze_lies_between_the_scene_and_its_airlight():
    clean = photograph()
    for seed in range(20):
        hazy = damaged(clean, Haze.draw(np.random.default_rng(seed), *clean.shape[:2]))
        assert hazy.std() < clean.std()
        assert hazy.mean() > clean.mean()


def test_a_tint_colours_the_airlight():
    grey = np.full((60, 60, 3), 0.4, np.float32)
    colour = {}
    for tint in (0.0, 0.12):
        recipes = [Haze.draw(np.random.default_rng(seed), 60, 60, tint=tint) for seed in range(10)]
        colour[tint] = max(np.ptp(damaged(grey, recipe).mean(axis=(0, 1))) for recipe in recipes)
    assert colour[0.0] < 0.01 < 0.05 < colour[0.12]


def test_motion_blur_removes_fine_texture():
    clean = photograph()
    for seed in range(10):
        blurred = damaged(clean, MotionBlur.draw(np.random.default_rng(seed)))
        assert np.abs(np.diff(blurred, axis=1)).mean() < 0.6 * np.abs(np.diff(clean, axis=1)).mean()


def test_low_light_is_darker_than_the_clean_limit():
    clean = photograph()
    for seed in range(20):
        dark = damaged(clean, LowLight.draw(np.random.default_rng(seed)))
        assert dark.mean() < CLEAN_LIMITS.exposure * clean.mean()


def test_low_light_may_shift_the_white_balance_by_a_tenth():
    grey = np.full((60, 60, 3), 0.8, np.float32)
    colours = [damaged(grey, LowLight.draw(np.random.default_rng(seed))).mean(axis=(0, 1)) for seed in range(30)]
    ratios = np.array([red / blue for red, _, blue in colours])
    assert 0.78 < ratios.min() < 0.95
    assert 1.05 < ratios.max() < 1.28


def test_a_longer_exposure_lifts_what_is_dark_and_leaves_what_is_bright():
    window = np.full((80, 80, 3), (0.1, 0.2, 0.15), np.float32)
    window[30:50, 30:50] = 0.9
    window[38:42, 60:64] = 0.9  # a lamp in the dark
    found = well_exposed(window)
    assert 0.3 < found[:8, :8].mean() < 0.5
    assert found[:8, :8, 1].mean() > 1.5 * found[:8, :8, 0].mean()
    for lit in (found[36:44, 36:44], found[38:42, 60:64]):
        assert 0.9 <= lit.mean() < 0.96
    ramp = np.linspace(0, 1, 64, dtype=np.float32)
    flat = [well_exposed(np.full((20, 20, 3), level, np.float32)).mean() for level in ramp]
    assert (np.diff(flat) > 0).all()
    assert (flat >= ramp - 1e-6).all()


def test_deep_shadow_keeps_the_lit_part_and_darkens_the_rest():
    window = np.full((80, 80, 3), 0.3, np.float32)
    window[30:50, 30:50] = 0.95
    for seed in range(20):
        dark = damaged(window, DeepShadow.draw(np.random.default_rng(seed)))
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


def test_motion_blur_spreads_beyond_what_counts_as_clean():
    point = np.zeros((121, 121, 3), np.float32)
    point[60, 60] = 1
    for seed in range(100):
        drawn = replace(MotionBlur.draw(np.random.default_rng(seed), wander=4.0), sigma_255=0.0, highlights=None)
        spread = damaged(point, drawn).mean(axis=2).clip(0)
        assert spread_px(spread) >= 1.39 * CLEAN_LIMITS.blur_px, seed


def test_half_of_the_blur_is_a_trembling_hands(monkeypatch):
    made = []
    monkeypatch.setattr("pipeline.degradations.tremor_kernel", lambda rng, **_: made.append(1) or np.eye(15) / 15)
    rng = np.random.default_rng(0)
    for _ in range(200):
        draw_recipe(Degradation.BLUR, rng, 64, 64)
    assert 75 <= len(made) <= 125
