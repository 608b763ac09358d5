"""Small arrays that degradations are made of: point spread functions, streaks, and smooth fields over an image."""

from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Kernel = NDArray[np.float32]
Field = NDArray[np.float32]


def gaussian_kernel(sigma_px: float) -> Kernel:
    """An isotropic Gaussian that sums to 1."""
    reach = max(1, int(np.ceil(3 * sigma_px)))
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma_px, 1e-3)) ** 2)
    kernel = np.outer(line, line)
    return cast(Kernel, (kernel / kernel.sum()).astype(np.float32))


def disk_kernel(radius_px: float) -> Kernel:
    """Defocus: a disk with soft edges that sums to 1."""
    reach = int(np.ceil(radius_px)) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.clip(radius_px + 0.5 - np.hypot(x, y), 0, 1)
    return cast(Kernel, (disk / disk.sum()).astype(np.float32))


def line_kernel(length_px: float, angle_deg: float, width_px: float, *, taper: float = 0.0) -> Kernel:
    """One soft-edged streak, its peak at 1; `angle_deg` from the vertical.

    Towards both ends it fades out over the share `taper` of its half length, 0..1.
    """
    radius = int(np.ceil(length_px / 2 + width_px))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32)
    angle = np.deg2rad(angle_deg)
    along = np.abs(x * np.sin(angle) + y * np.cos(angle))
    across = np.abs(x * np.cos(angle) - y * np.sin(angle))
    body = np.clip((length_px / 2 - along + 0.5) / max(taper * length_px / 2, 1.0), 0, 1)
    body = body * np.exp(-0.5 * (across / (width_px / 2)) ** 2)
    return cast(Kernel, (body / body.max()).astype(np.float32))


def trajectory_kernel(rng: np.random.Generator, *, length_px: float, wander: float = 1.0) -> Kernel:
    """Point spread function of a shaking camera, summing to 1: the path of a random walk with inertia.

    Args:
        rng: the source of the path.
        length_px: length of the path in pixels. A straight path has a standard deviation of 0.29 times it.
        wander: how fast the path turns; at 1 most are near straight, at 4 most wind about a place.
    """
    steps = 96
    heading = rng.uniform(0, 2 * np.pi)
    turn = rng.normal(0, 0.12 * wander, steps).cumsum() * rng.uniform(0, 1)
    if rng.random() < 0.3:
        turn[int(rng.integers(steps // 4, steps)) :] += rng.uniform(-np.pi, np.pi)
    speed = np.exp(rng.normal(0, 0.5) * np.linspace(-1, 1, steps) + 0.3 * rng.standard_normal(steps))
    speed *= length_px / speed.sum()
    return _drawn(np.cumsum(speed * np.cos(heading + turn)), np.cumsum(speed * np.sin(heading + turn)))


@cache
def _tremor() -> NDArray[np.float64]:
    """What makes white noise a coordinate of the hand over an exposure."""
    apart = np.sqrt(3) / 0.3 * np.abs(np.subtract.outer(*[np.linspace(0, 1, 256)] * 2))
    return np.linalg.cholesky((1 + apart) * np.exp(-apart) + 1e-9 * np.eye(len(apart)))


def tremor_kernel(rng: np.random.Generator, *, length_px: float) -> Kernel:
    """Point spread function of a trembling hand, summing to 1: it turns back, and lingers where it does.

    Both coordinates are Gaussian processes with a Matern 3/2 covariance of length scale 0.3 of the exposure (Schuler,
    Hirsch, Harmeling and Schoelkopf, "Learning to Deblur", TPAMI 2016).

    Args:
        rng: the source of the path.
        length_px: of the straight, even path that spreads as much as this one along its longest axis.
    """
    path = _tremor() @ rng.standard_normal((256, 2))
    widest = np.linalg.eigvalsh(np.cov(path.T, ddof=0))[-1] ** 0.5
    return _drawn(*(path * (length_px / np.sqrt(12) / widest)).T)


def _drawn(x: NDArray[np.float64], y: NDArray[np.float64]) -> Kernel:
    """The kernel of a path that stays equally long at each of its points, which are given in pixels."""
    x, y = x - x.mean(), y - y.mean()
    radius = int(np.ceil(max(np.abs(x).max(), np.abs(y).max()))) + 2  # a pixel more for the softening
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - column, y - row
    for dx, dy, weight in ((0, 0, (1 - fx) * (1 - fy)), (1, 0, fx * (1 - fy)), (0, 1, (1 - fx) * fy), (1, 1, fx * fy)):
        np.add.at(kernel, (row + dy + radius, column + dx + radius), weight)
    for axis in (0, 1):
        kernel = 0.9 * kernel + 0.05 * (np.roll(kernel, 1, axis) + np.roll(kernel, -1, axis))
    return cast(Kernel, (kernel / kernel.sum()).astype(np.float32))


def spread_px(kernel: NDArray[np.floating]) -> float:
    """Standard deviation of a kernel along its longest axis, in pixels."""
    y, x = np.mgrid[: kernel.shape[0], : kernel.shape[1]]
    places = np.stack([y.ravel(), x.ravel()])
    covariance = np.cov(places, aweights=kernel.ravel(), ddof=0)
    return float(np.sqrt(np.linalg.eigvalsh(covariance)[-1]))


def smooth_field(height: int, width: int, rng: np.random.Generator, *, cells: int = 4) -> Field:
    """A smooth random field in [0, 1], H x W: a coarse grid of `cells` random values a side, enlarged."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    low, high = float(field.min()), float(field.max())
    return (field - low) / max(high - low, 1e-6)


def pseudo_depth(height: int, width: int, rng: np.random.Generator) -> Field:
    """A depth map in [0, 1], H x W: farther towards the top as a rule, with smooth hills and valleys.

    Half of the maps are cut into a few planes, as walls and furniture cut a room.
    """
    ramp = np.linspace(1, 0, height, dtype=np.float32)[:, None] * np.ones((1, width), dtype=np.float32)
    share = rng.uniform(0, 0.8)
    depth = share * ramp + (1 - share) * smooth_field(height, width, rng, cells=int(rng.integers(2, 7)))
    if rng.random() < 0.5:
        planes = rng.integers(3, 9)
        depth = 0.5 * depth + 0.5 * np.round(depth * planes) / planes
    return depth.astype(np.float32)
