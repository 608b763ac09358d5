"""Metrics agree with an independent implementation: scikit-image for PSNR, torchmetrics for SSIM."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import structural_similarity_index_measure

from pipeline import metrics
from pipeline.metrics import PSNR_CAP_DB, change_rmse_255, clipped_fraction, is_flat, psnr_db, ssim


def random_pair(height, width, seed, spread=40, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    one = rng.integers(0, top + 1, (height, width, 3))
    two = np.clip(one + rng.normal(0, spread * top / 255, one.shape), 0, top)
    return one.astype(dtype), two.astype(dtype)


def oracle_ssim(one, two):
    top = np.iinfo(one.dtype).max
    pair = (torch.from_numpy(image / top).permute(2, 0, 1)[None] for image in (one, two))
    _, by_window = structural_similarity_index_measure(*pair, sigma=1.5, data_range=1.0, return_full_image=True)
    return float(by_window[:, :, 5:-5, 5:-5].mean())  # torchmetrics' own mean includes mirrored borders


@settings(max_examples=15, deadline=None)
@given(st.integers(11, 40), st.integers(11, 40), st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.uint16]))
def test_agree_with_the_oracle_at_any_size(height, width, seed, dtype):
    one, two = random_pair(height, width, seed, dtype=dtype)
    top = np.iinfo(dtype).max
    assert psnr_db(one, two) == pytest.approx(peak_signal_noise_ratio(one / top, two / top, data_range=1.0), abs=1e-4)
    assert ssim(one, two) == pytest.approx(oracle_ssim(one, two), abs=1e-4)


@pytest.mark.parametrize("sigma_255", [2, 15, 50])
def test_agree_with_the_oracle_on_a_photograph(sigma_255):
    photograph = data.astronaut()[40:200, 100:300]
    noisy = photograph + np.random.default_rng(0).normal(0, sigma_255, photograph.shape)
    noisy = np.rint(noisy.clip(0, 255)).astype(np.uint8)
    assert psnr_db(noisy, photograph) == pytest.approx(peak_signal_noise_ratio(photograph, noisy), abs=1e-4)
    assert ssim(noisy, photograph) == pytest.approx(oracle_ssim(photograph, noisy), abs=1e-4)


def test_equal_images_are_capped_and_perfect():
    one, _ = random_pair(16, 16, 0)
    assert psnr_db(one, one) == PSNR_CAP_DB
    assert ssim(one, one) == pytest.approx(1.0, abs=1e-6)


def test_known_error_has_its_psnr():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr_db(black, grey) == pytest.approx(20 * np.log10(5), abs=1e-4)


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (1, 1)])
def test_ssim_of_images_without_room_for_a_window_is_none(height, width):
    one, two = random_pair(height, width, 0)
    assert ssim(one, two) is None
    assert psnr_db(one, two) > 0


def test_ssim_in_bands_is_that_of_the_whole(monkeypatch):
    one, two = random_pair(47, 30, 0)
    whole = ssim(one, two)
    for rows in (8, 9, 36, 37):
        monkeypatch.setattr(metrics, "_SSIM_VALUES_AT_ONCE", (rows + 10) * 30 * 3 * 4)
        assert ssim(one, two) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("metric", [psnr_db, ssim, change_rmse_255])
def test_pairs_must_match(metric):
    one, _ = random_pair(12, 20, 0)
    with pytest.raises(ValueError, match="20 x 12 and 19 x 12"):
        metric(one, one[:, :19])
    with pytest.raises(ValueError, match="uint8 and uint16"):
        metric(one, one.astype(np.uint16))


def test_change_is_on_the_scale_of_eight_bits_whatever_the_depth():
    one = np.full((5, 5, 3), 100, np.uint8)
    two = one + np.uint8(10)
    assert change_rmse_255(one, two) == pytest.approx(10)
    assert change_rmse_255(two, one) == pytest.approx(10)
    assert change_rmse_255(one.astype(np.uint16) * 257, two.astype(np.uint16) * 257) == pytest.approx(10)
    assert change_rmse_255(one, one) == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_clipped_values_are_those_at_either_end(dtype):
    image = np.full((2, 2, 3), 100, dtype)
    assert clipped_fraction(image) == 0
    image[0, 0], image[1, 1, 0] = 0, np.iinfo(dtype).max
    assert clipped_fraction(image) == pytest.approx(4 / 12)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_figures_of_large_images_are_those_of_all_their_parts(monkeypatch, dtype):
    monkeypatch.setattr(metrics, "_VALUES_AT_ONCE", 100)
    one, two = random_pair(13, 17, 3, dtype=dtype)
    top = np.iinfo(dtype).max
    rmse = np.sqrt(np.mean((one.astype(float) - two) ** 2)) * 255 / top
    assert change_rmse_255(one, two) == pytest.approx(rmse, rel=1e-6)
    assert change_rmse_255(one[:, ::-1], two[:, ::-1]) == pytest.approx(rmse, rel=1e-6)  # not contiguous in memory
    two[12:] = 0, top, 7
    clipped = np.mean((two == 0) | (two == top))
    assert clipped >= 2 / 3 / 13
    assert clipped_fraction(two) == pytest.approx(clipped)


def test_a_picture_of_one_tone_is_flat_but_for_a_few_levels():
    image = np.random.default_rng(0).integers(250, 255, (70, 90, 3), dtype=np.uint8)
    assert is_flat(image)
    image[5, 7, 1] = 200
    assert not is_flat(image)
    assert is_flat(np.full((3, 2, 3), (255, 0, 7), np.uint8))
    sensor = np.random.default_rng(0).integers(0, 1023, (30, 40, 3), dtype=np.uint16)
    assert not is_flat(sensor), "a picture at the bottom of its range"
    assert is_flat(sensor // 16)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_is_flat_and_a_very_dark_photograph_is_not(dtype):
    mask = np.zeros((70, 90, 3), dtype)
    mask[5:40, 7:60], mask[30:, 50:], mask[:2] = 1, 20, 255
    assert is_flat(mask)
    assert not is_flat(mask[:, :1].repeat(40, 1) + np.arange(40, dtype=dtype)[None, :, None]), "of as many shades"
    levels = np.random.default_rng(0).integers(0, 20, (70, 90, 1)) * (np.iinfo(dtype).max // 255)
    dark = levels.astype(dtype).repeat(3, 2)
    assert not is_flat(dark), "of few colours, but not in areas"
    assert not is_flat(dark[:, :1]), "without neighbours"
