import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.pixels import RandomPixels, column, convolve, follow_edges, maps, quantiles, sky, to_linear, to_srgb
from pipeline.point_spread import disk_kernel, gaussian_kernel


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def convolved_by_sums(image, kernel):
    """The definition, on H x W x C: a sum over kernel taps of shifted, mirrored images."""
    above, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(
        image, ((kernel.shape[0], kernel.shape[0]), (kernel.shape[1], kernel.shape[1]), (0, 0)), "symmetric"
    )
    out = np.zeros_like(image)
    for i, j in np.ndindex(kernel.shape):
        top, start = kernel.shape[0] - (i - above), kernel.shape[1] - (j - left)
        out += kernel[i, j] * padded[top : top + image.shape[0], start : start + image.shape[1]]
    return out


@pytest.mark.parametrize("size", [(23, 31), (6, 5)])
def test_each_image_is_convolved_with_its_own_kernel(size):
    shapes = [(3, 3), (5, 3), (1, 7), (4, 6), (1, 1)]
    kernels = [np.random.default_rng(i).random(shape) for i, shape in enumerate(shapes)]
    images = pictures(len(shapes), *size)
    found = convolve(images, kernels)
    for image, kernel, out in zip(images, kernels, found, strict=True):
        wanted = convolved_by_sums(image.permute(1, 2, 0).numpy(), kernel)
        np.testing.assert_allclose(out.permute(1, 2, 0).numpy(), wanted, atol=2e-5)


def test_a_kernel_may_be_wider_than_the_image():
    flat = torch.full((1, 2, 4, 7), 0.3)
    torch.testing.assert_close(convolve(flat, [disk_kernel(6)]), flat, atol=1e-6, rtol=0)


def test_what_is_beside_an_image_changes_it_by_rounding_alone():
    images, kernels = pictures(2, 20, 30), [gaussian_kernel(1.0), disk_kernel(7)]
    together = convolve(images, kernels)
    for place in range(2):
        alone = convolve(images[place : place + 1], kernels[place : place + 1])
        torch.testing.assert_close(together[place : place + 1], alone, atol=1e-6, rtol=0)


def test_light_and_display_are_each_others_inverse():
    levels = torch.linspace(0, 1, 256)
    torch.testing.assert_close(to_srgb(to_linear(levels)), levels, atol=1e-5, rtol=0)
    assert float(to_linear(torch.tensor(0.5))) == pytest.approx(0.214, abs=1e-3)


def test_sky_is_bright_smooth_and_reaches_the_top():
    scene = np.full((90, 90, 3), 0.2, np.float32)
    scene[:40] = 0.9
    scene[:40, 60:] += np.random.default_rng(0).uniform(-0.3, 0.1, (40, 30, 3)).astype(np.float32)
    scene[60:80, 10:50] = 0.9
    found = sky(torch.from_numpy(scene).permute(2, 0, 1)[None])[0, 0]
    assert found[5:30, 10:50].min() > 0.9
    assert found[5:30, 70:].max() < 0.1  # rough: leaves against the light
    assert found[62:78, 12:48].max() < 0.1  # below dark ground: a white wall


def test_there_is_sky_below_a_bird_but_none_below_a_roof_or_where_it_is_on_one_side():
    scenes = np.full((3, 120, 120, 3), 0.9, np.float32)
    scenes[:, 90:] = 0.2
    bird, house, branch = scenes
    bird[30:40, 50:70] = 0.1
    house[20:24, 40:80] = house[20:90, 40:44] = house[20:90, 76:80] = 0.1  # its wall is as bright and smooth as the sky
    branch[20:24, 60:] = 0.1  # a bright meadow lies below it, and at its left the sky comes down
    bird, house, meadow = sky(torch.from_numpy(scenes).permute(0, 3, 1, 2))[:, 0]
    assert bird[50:80, 55:65].min() > 0.9
    assert bird[33:37, 54:66].max() < 0.1
    assert house[30:80, 50:70].max() < 0.1 < 0.9 < house[30:80, 10:30].min()
    assert meadow[34:80, 70:].max() < 0.1 < 0.9 < meadow[34:80, 10:50].min()


@pytest.mark.parametrize("size", [(80, 120), (9, 7), (1, 1)])
def test_a_map_without_steps_stays_as_it_is(size):
    flat = torch.full((1, 1, *size), 0.4)
    torch.testing.assert_close(follow_edges(flat, pictures(1, *size)), flat, atol=1e-5, rtol=0)
    number = torch.full((2, 1, 1, 1), 0.4)
    assert torch.equal(follow_edges(number, pictures(2, *size)), number)


def test_steps_of_a_map_move_to_edges_and_are_slopes_where_there_are_none():
    step = torch.zeros(1, 1, 80, 120)
    step[..., 60:] = 1.0
    plain, edge = torch.full((1, 3, 80, 120), 0.5), torch.full((1, 3, 80, 120), 0.2)
    edge[..., 63:] = 0.8
    slope, moved = follow_edges(step, plain)[0, 0, 40], follow_edges(step, edge)[0, 0, 40]
    assert float(slope.diff().max()) < 0.1
    for found in (slope, moved):
        assert (float(found.min()), float(found.max())) == pytest.approx((0.0, 1.0), abs=1e-6)
        assert float(found[40]) < 0.01 < 0.99 < float(found[80])
    assert int(moved.diff().argmax()) == 62
    assert float(moved.diff().max()) > 4 * float(slope.diff().max())
    together = follow_edges(step.expand(2, -1, -1, -1), torch.cat([plain, edge]))
    torch.testing.assert_close(together[:, 0, 40], torch.stack([slope, moved]), atol=1e-5, rtol=0)


def test_each_image_has_random_pixels_of_its_own_seed():
    like = pictures(3, 20, 40)
    first, second = RandomPixels([1, 2, 1], like), RandomPixels([2], like[:1])
    normal, uniform = first.normal(), first.uniform([0, 2])
    assert normal.shape == like.shape
    assert torch.equal(normal[0], normal[2])
    assert not torch.equal(normal[0], normal[1])
    assert torch.equal(normal[1:2], second.normal())
    assert uniform.shape == (2, 1, 20, 40)
    assert torch.equal(uniform[0], uniform[1])
    assert torch.equal(first.uniform([1]), second.uniform([0]))


def test_each_image_has_its_own_quantile():
    images = torch.rand(3, 1, 9, 13)
    wanted = [float(torch.quantile(image, q)) for image, q in zip(images, (0.1, 0.5, 0.93), strict=True)]
    found = quantiles(images, column([0.1, 0.5, 0.93], images))
    assert found.shape == (3, 1, 1, 1)
    assert found.flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def test_numbers_and_maps_of_each_image():
    images = pictures(2, 4, 5)
    field = np.arange(20, dtype=np.float32).reshape(4, 5)
    found = maps([field, 0.5], images)
    assert torch.equal(found[0, 0], torch.from_numpy(field))
    assert found[1].unique().tolist() == [0.5]
    assert column([(1, 2, 3), (4, 5, 6)], images).shape == (2, 3, 1, 1)
    assert column([True, False], images).flatten().tolist() == [1, 0]
