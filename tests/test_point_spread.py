import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.point_spread import (
    disk_kernel,
    gaussian_kernel,
    line_kernel,
    pseudo_depth,
    smooth_field,
    spread_px,
    trajectory_kernel,
    tremor_kernel,
)


@pytest.mark.parametrize("kernel", [gaussian_kernel(1.3), disk_kernel(4.5)], ids=["gaussian", "disk"])
def test_kernels_sum_to_one_and_are_symmetric(kernel):
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-7)
    np.testing.assert_allclose(kernel, kernel.T, atol=1e-7)


def test_a_gaussian_has_the_width_asked_for():
    assert spread_px(gaussian_kernel(2.0)) == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize("angle_deg", [0, 30, 90])
def test_a_streak_lies_along_its_angle(angle_deg):
    kernel = line_kernel(30, angle_deg, 1.5)
    assert kernel.max() == pytest.approx(1)
    assert spread_px(kernel) == pytest.approx(30 / np.sqrt(12), rel=0.1)
    y, x = np.mgrid[: kernel.shape[0], : kernel.shape[1]] - (kernel.shape[0] - 1) / 2
    along = x * np.sin(np.deg2rad(angle_deg)) + y * np.cos(np.deg2rad(angle_deg))
    across = x * np.cos(np.deg2rad(angle_deg)) - y * np.sin(np.deg2rad(angle_deg))
    assert (kernel * along**2).sum() > 20 * (kernel * across**2).sum()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length_px=st.floats(2, 60))
def test_a_trajectory_sums_to_one_and_is_no_longer_than_its_path(seed, length_px):
    kernel = trajectory_kernel(np.random.default_rng(seed), length_px=length_px)
    assert kernel.sum() == pytest.approx(1, abs=1e-4)
    assert kernel.min() >= 0
    assert spread_px(kernel) <= length_px / 2 + 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length_px=st.floats(6, 60))
def test_a_tremor_sums_to_one_and_spreads_as_far_as_asked_for(seed, length_px):
    kernel = tremor_kernel(np.random.default_rng(seed), length_px=length_px)
    assert kernel.sum() == pytest.approx(1, abs=1e-4)
    assert kernel.min() >= 0
    softening = 2 * 0.05 + 0.25  # px^2: of the two neighbours, and at most of a point's share between two pixels
    assert length_px**2 / 12 - 0.1 <= spread_px(kernel) ** 2 <= length_px**2 / 12 + softening


def test_a_trembling_hand_winds_and_lingers():
    def winding(kernel):
        y, x = np.mgrid[: kernel.shape[0], : kernel.shape[1]]
        covariance = np.cov(np.stack([y.ravel(), x.ravel()]), aweights=kernel.ravel(), ddof=0)
        low, high = np.linalg.eigvalsh(covariance)
        return (low / high) ** 0.5

    rng = np.random.default_rng(0)
    tremors = [tremor_kernel(rng, length_px=30) for _ in range(40)]
    straight = [trajectory_kernel(rng, length_px=30) for _ in range(40)]
    assert np.median([winding(kernel) for kernel in tremors]) > 3 * np.median([winding(kernel) for kernel in straight])
    # The busiest pixel holds several times what one of even travel would.
    assert np.median([kernel.max() * np.count_nonzero(kernel) for kernel in tremors]) > 8


def test_the_spread_of_a_kernel():
    assert spread_px(gaussian_kernel(2.0)) == pytest.approx(2.0, rel=0.02)
    line = np.zeros((3, 13))
    line[1] = 1
    assert spread_px(line) == pytest.approx(np.sqrt((13**2 - 1) / 12))


def test_depth_and_fields_stay_in_their_range():
    rng = np.random.default_rng(0)
    for _ in range(20):
        for field in (pseudo_depth(30, 50, rng), smooth_field(30, 50, rng)):
            assert field.shape == (30, 50)
            assert field.min() >= 0
            assert field.max() <= 1
