"""Synthesised degradations: clean photographs in, degraded ones out, every draw from a given generator.

All images are H x W x 3 float32, RGB, in [0, 1] as displayed (sRGB), and results are clipped to [0, 1].
Nothing here reads a file or keeps state. Which strength still counts as clean stands in
`classifier.labels.CleanLimits`.
"""

import io
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from classifier.labels import CLEAN_LIMITS, Degradation
from classifier.sigma import estimate_sigma

FloatImage = NDArray[np.float32]


def to_uint8(image: FloatImage) -> NDArray[np.uint8]:
    """Rounds [0, 1] to 0..255."""
    return cast(NDArray[np.uint8], np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))


def _clip(image: NDArray[np.floating]) -> FloatImage:
    return cast(FloatImage, np.clip(image, 0, 1).astype(np.float32))


def _fast_length(length: int) -> int:
    """The next length with no prime factor but 2, 3 and 5: Fourier transforms of others are several times slower."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


def convolve(image: FloatImage, kernel: NDArray[np.floating]) -> FloatImage:
    """Convolves each channel with a 2-D kernel, borders mirrored; same size out."""
    height, width = image.shape[:2]
    above, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    below, right = kernel.shape[0] - 1 - above, kernel.shape[1] - 1 - left
    padded = np.pad(image.transpose(2, 0, 1), ((0, 0), (below, above), (right, left)), mode="symmetric")
    shape = (_fast_length(padded.shape[1]), _fast_length(padded.shape[2]))
    product = np.fft.rfft2(padded, shape) * np.fft.rfft2(kernel.astype(np.float32), shape)
    full = np.fft.irfft2(product, shape)
    top, start = kernel.shape[0] - 1, kernel.shape[1] - 1
    inside = full[:, top : top + height, start : start + width]
    return np.ascontiguousarray(inside.transpose(1, 2, 0), dtype=np.float32)


def smooth_field(height: int, width: int, rng: np.random.Generator, *, cells: int = 4) -> FloatImage:
    """A smooth random field in [0, 1], H x W: a coarse grid of `cells` random values a side, enlarged."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    low, high = float(field.min()), float(field.max())
    return (field - low) / max(high - low, 1e-6)


def to_linear(image: FloatImage) -> FloatImage:
    """The light that was there, from sRGB as displayed (IEC 61966-2-1)."""
    dark, light = image / np.float32(12.92), ((image + np.float32(0.055)) / np.float32(1.055)) ** np.float32(2.4)
    return np.where(image <= 0.04045, dark, light)


def to_srgb(light: FloatImage) -> FloatImage:
    """The inverse of `to_linear`, clipped to [0, 1]."""
    light = _clip(light)
    dark, bright = light * np.float32(12.92), np.float32(1.055) * light ** np.float32(1 / 2.4) - np.float32(0.055)
    return np.where(light <= 0.0031308, dark, bright)


def resize(image: FloatImage, height: int, width: int) -> FloatImage:
    """Resamples with a Lanczos filter that averages when it shrinks."""
    channels = [
        np.asarray(Image.fromarray(image[:, :, c]).resize((width, height), Image.Resampling.LANCZOS))
        for c in range(image.shape[2])
    ]
    return _clip(np.stack(channels, axis=2))


# Noise


def add_noise(image: FloatImage, rng: np.random.Generator, *, sigma_255: float) -> FloatImage:
    """White Gaussian noise of standard deviation `sigma_255` on the 0..255 scale."""
    return _clip(image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(sigma_255 / 255))


def add_camera_noise(
    image: FloatImage, rng: np.random.Generator, *, sigma_255: float, coarsest_px: float = 0.8
) -> FloatImage:
    """Noise of a sensor, seen through what a camera does to it, with a mean of `sigma_255` on the 0..255 scale.

    In linear light a part whose variance grows with the signal and a constant one (Foi et al., "Practical
    Poissonian-Gaussian noise modeling", 2008); then, as demosaicking and noise reduction leave it, smoothed by a
    Gaussian of up to `coarsest_px`, and stronger by 1 to 2.5 in colour than in brightness in half of the cases.
    """
    light = to_linear(image)
    constant = rng.uniform(0.02, 0.3)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.sqrt(light + np.float32(constant**2))
    if rng.random() < 0.7:
        noise = convolve(noise, gaussian_kernel(float(rng.uniform(0.3, coarsest_px))))
    if rng.random() < 0.5:
        brightness = noise.mean(axis=2, keepdims=True)
        noise = brightness + np.float32(rng.uniform(1, 2.5)) * (noise - brightness)
    # The slope of the display curve turns noise in light into noise on the 0..255 scale.
    slope = 1 / np.maximum(2.4 / 1.055 * ((image + 0.055) / 1.055) ** 1.4, 1 / 12.92)
    seen = noise * slope.astype(np.float32)
    return _clip(image + seen * np.float32(sigma_255 / 255 / max(float(seen.std()), 1e-6)))


def draw_noise_sigma(rng: np.random.Generator) -> float:
    """A standard deviation for training on the 0..255 scale: uniform in 5..55."""
    return float(rng.uniform(CLEAN_LIMITS.noise_sigma_255, 55.0))


# Rain


def line_kernel(length_px: float, angle_deg: float, width_px: float, *, taper: float = 0.0) -> NDArray[np.float32]:
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
    return cast(NDArray[np.float32], (body / body.max()).astype(np.float32))


FAINTEST_STREAKS = 0.01
"""Of 1, on average over the image."""


def add_rain(
    image: FloatImage, rng: np.random.Generator, *, spread_deg: float = 3.0, downpours: bool = False
) -> FloatImage:
    """Rain in one to three layers of streaks that share a wind direction up to `spread_deg`, and at times a veil.

    Per layer: streak length 8..80 px, width 0.8..6 px and at most a fifth of the length, sharp or tapering ends,
    0.2 to 4 drops per 1000 pixels (fewer when they are large), brightness 0.1..0.9. Streaks are blended towards a
    near-white of their own, or in half of the layers added, as light that reaches the sensor besides the scene's.
    With `downpours` streaks may be 6 px short, one of six layers has 4 to 20 drops, and a third of the layers show in
    parts of the picture only: drops are seen where light falls on them.
    Where streaks change the image by `FAINTEST_STREAKS`, three in ten have a veil of up to a tenth, one in ten of up to
    0.4, thicker with `pseudo_depth`: distant drops that are too small to be seen as streaks (Li et al., "Heavy rain
    image restoration", CVPR 2019).
    """
    height, width = image.shape[:2]
    wind_deg = rng.uniform(-45, 45)
    out = image
    for _ in range(rng.integers(1, 4)):
        length_px = np.exp(rng.uniform(np.log(6 if downpours else 8), np.log(80)))
        width_px = np.exp(rng.uniform(np.log(0.8), np.log(min(6.0, 0.2 * length_px))))
        kernel = line_kernel(length_px, wind_deg + rng.normal(0, spread_deg), width_px, taper=rng.uniform(0, 1))
        fewest, most = (4e-3, 2e-2) if downpours and rng.random() < 1 / 6 else (2e-4, 4e-3)
        density = np.exp(rng.uniform(np.log(fewest), np.log(most))) * min(1.0, 40 / (length_px * width_px))
        drops = (rng.random((height, width), dtype=np.float32) < density) * rng.uniform(0.3, 1.0, (height, width))
        streaks = convolve(drops[:, :, None].astype(np.float32), kernel)
        opacity = np.clip(streaks, 0, 1) * np.float32(rng.uniform(0.1, 0.9))
        if downpours and rng.random() < 1 / 3:
            opacity *= smooth_field(height, width, rng, cells=int(rng.integers(2, 6)))[:, :, None]
        if rng.random() < 0.5:
            out = out + 0.6 * opacity
        else:
            out = out + opacity * (np.float32(rng.uniform(0.7, 1.0)) - out).clip(0)
    kind = rng.random()
    if float(np.abs(_clip(out) - image).mean()) < FAINTEST_STREAKS:
        pass  # a veil alone is haze
    elif kind < 0.3:
        veil = np.float32(rng.uniform(0.0, 0.1))
        out = out * (1 - veil) + veil * np.float32(0.8)
    elif kind < 0.4:
        thickness = np.float32(rng.uniform(0.1, 0.4)) * (0.4 + 0.6 * pseudo_depth(height, width, rng))[:, :, None]
        out = out * (1 - thickness) + thickness * np.float32(rng.uniform(0.5, 0.9))
    return _clip(out)


# Haze


def pseudo_depth(height: int, width: int, rng: np.random.Generator) -> FloatImage:
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


def sky(image: FloatImage) -> FloatImage:
    """How much each pixel is like sky, 0..1, H x W: bright, smooth, and joined to the top through such pixels."""
    blurred = convolve(image, gaussian_kernel(2.0))
    luminance = blurred.mean(axis=2)
    rough = convolve(np.abs(image - blurred).mean(axis=2, keepdims=True), gaussian_kernel(2.0))[:, :, 0]
    like = np.clip((luminance - 0.45) / 0.2, 0, 1) * np.clip((0.03 - rough) / 0.015, 0, 1)
    joined = np.minimum.accumulate(like, axis=0)
    soft = convolve(joined[:, :, None].astype(np.float32), gaussian_kernel(2.0))[:, :, 0]
    return cast(FloatImage, np.clip(soft, 0, 1))


def add_haze(
    image: FloatImage, rng: np.random.Generator, *, tint: float = 0.04, clear_foregrounds: bool = False
) -> FloatImage:
    """The scattering model I = J t + A (1 - t), with t = exp(-beta d) (He et al., "Dark channel prior", 2009).

    d is `pseudo_depth` stretched to 0.2..1, or to a narrower range for scenes without much depth, and in half of the
    cases 1 where there is `sky`; beta is 0.4..2.4. With `clear_foregrounds`, in a quarter of the cases d begins at
    0..0.1, and beta is 1..4. The airlight A is 0.65..1 with a tint of up to `tint` per channel.
    """
    height, width = image.shape[:2]
    clear_foreground = clear_foregrounds and rng.random() < 0.25
    near = rng.uniform(0, 0.1) if clear_foreground else rng.uniform(0.2, 0.7)
    depth = near + (1 - near) * pseudo_depth(height, width, rng)
    if rng.random() < 0.5:
        depth = np.maximum(depth, sky(image))
    beta = rng.uniform(1, 4) if clear_foreground else rng.uniform(0.4, 2.4)
    transmission = np.exp(-beta * depth)[:, :, None]
    airlight = np.clip(rng.uniform(0.65, 1.0) + rng.uniform(-tint, tint, 3), 0, 1)
    return _clip(image * transmission + airlight * (1 - transmission))


# Motion blur


def trajectory_kernel(rng: np.random.Generator, *, length_px: float, wander: float = 1.0) -> NDArray[np.float32]:
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
    x, y = np.cumsum(speed * np.cos(heading + turn)), np.cumsum(speed * np.sin(heading + turn))
    x, y = x - x.mean(), y - y.mean()
    radius = int(np.ceil(max(np.abs(x).max(), np.abs(y).max()))) + 1
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - column, y - row
    for dx, dy, weight in ((0, 0, (1 - fx) * (1 - fy)), (1, 0, fx * (1 - fy)), (0, 1, (1 - fx) * fy), (1, 1, fx * fy)):
        np.add.at(kernel, (row + dy + radius, column + dx + radius), weight)
    soft = np.outer([0.05, 0.9, 0.05], [0.05, 0.9, 0.05])
    kernel = np.asarray(convolve(kernel[:, :, None].astype(np.float32), soft)[:, :, 0], dtype=np.float64).clip(0)
    return cast(NDArray[np.float32], (kernel / kernel.sum()).astype(np.float32))


def spread_px(kernel: NDArray[np.floating]) -> float:
    """Standard deviation of a kernel along its longest axis, in pixels."""
    y, x = np.mgrid[: kernel.shape[0], : kernel.shape[1]]
    places = np.stack([y.ravel(), x.ravel()])
    covariance = np.cov(places, aweights=kernel.ravel(), ddof=0)
    return float(np.sqrt(np.linalg.eigvalsh(covariance)[-1]))


def add_motion_blur(
    image: FloatImage, rng: np.random.Generator, *, longest_px: float = 40.0, wander: float = 1.0
) -> FloatImage:
    """Blur along a random camera trajectory from 6 px long, with sensor noise of sigma 0..2 on the 0..255 scale.

    In three of ten cases light is summed instead of displayed values, with highlights up to four times brighter than
    the photograph could hold: lamps draw their path (Rim et al., "Realistic blur synthesis", ECCV 2022).
    Paths that wind so much that they spread little beyond what counts as clean (`CleanLimits.blur_px`) are drawn again.
    """
    while True:
        length_px = float(np.exp(rng.uniform(np.log(6), np.log(longest_px))))
        kernel = trajectory_kernel(rng, length_px=length_px, wander=wander)
        if spread_px(kernel) >= 1.4 * CLEAN_LIMITS.blur_px:
            break
    if rng.random() < 0.3:
        light = to_linear(image)
        over = np.clip((image.min(axis=2, keepdims=True) - 0.94) / 0.06, 0, 1)
        blurred = to_srgb(convolve(light * (1 + np.float32(rng.uniform(0, 3)) * over), kernel))
    else:
        blurred = convolve(image, kernel)
    return add_noise(blurred, rng, sigma_255=float(rng.uniform(0, 2)))


# Low light


def add_lowlight(image: FloatImage, rng: np.random.Generator, *, lowest_gain: float = 0.12) -> FloatImage:
    """Under-exposure: gamma 1.2..3, gain up to 0.9 with a result below 0.55 of the brightness, sensor noise.

    In half of the cases white balance is off too, towards warm or cold, by up to a tenth in red and blue. The noise
    has a part that grows with the root of the signal and a constant one, each with sigma up to 4 on the 0..255 scale.
    """
    dark = image ** np.float32(rng.uniform(1.2, 3.0))
    if rng.random() < 0.5:
        warm = rng.uniform(-0.1, 0.1)
        dark = dark * np.array([1 + warm, 1, 1 - warm], dtype=np.float32)
    brightest = 0.55 * float(image.mean()) / max(float(dark.mean()), 1e-6)
    dark = dark * np.float32(min(np.exp(rng.uniform(np.log(lowest_gain), np.log(0.9))), brightest))
    sigma = rng.uniform(0, 4) / 255 * np.sqrt(dark) + rng.uniform(0, 4) / 255 * rng.random()
    return _clip(dark + sigma * rng.standard_normal(image.shape))


def add_deep_shadow(image: FloatImage, rng: np.random.Generator) -> FloatImage:
    """Under-exposure of a scene with much contrast: sky and lamps keep their level, the rest falls into the dark.

    What is locally among the brightest 3..50 % stays lit, at 0.4..1 of its level and with a soft edge; the rest gets
    gamma 1.1..2.2 and gain 0.04..0.35. In half of the cases both are gains in linear light, 2 to 6 stops down in the
    dark and at most 1.5 stops where it is lit: a shorter exposure of a scene whose lights outshine the rest. The
    result is below 0.55 of the brightness, with sensor noise of sigma 0..2 on the 0..255 scale.
    """
    local = convolve(image.mean(axis=2, keepdims=True), gaussian_kernel(float(rng.uniform(2, 8))))
    low, high = np.quantile(local, [rng.uniform(0.5, 0.85), rng.uniform(0.9, 0.99)])
    lit = np.clip((local - low) / max(high - low, 1e-3), 0, 1)
    lit = lit * lit * (3 - 2 * lit)
    if rng.random() < 0.5:
        shade, light = np.exp2(rng.uniform(-6, -2)), np.exp2(rng.uniform(-1.5, 0.3))
        out = to_srgb(to_linear(image) * (shade + (light - shade) * lit).astype(np.float32))
    else:
        dark = image ** np.float32(rng.uniform(1.1, 2.2)) * np.float32(np.exp(rng.uniform(np.log(0.04), np.log(0.35))))
        kept = np.float32(rng.uniform(0.4, 1))
        out = lit * kept * image ** np.float32(rng.uniform(0.9, 1.5)) + (1 - lit) * dark
    out = out * min(1.0, 0.55 * float(image.mean()) / max(float(out.mean()), 1e-6))
    return add_noise(_clip(out), rng, sigma_255=float(rng.uniform(0, 2)))


# Damage without a prompt


def add_jpeg(image: FloatImage, *, quality: int) -> FloatImage:
    """JPEG at the given libjpeg quality, 4:2:0."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"), dtype=np.float32) / np.float32(255)


def disk_kernel(radius_px: float) -> NDArray[np.float32]:
    """Defocus: a disk with soft edges that sums to 1."""
    reach = int(np.ceil(radius_px)) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.clip(radius_px + 0.5 - np.hypot(x, y), 0, 1)
    return cast(NDArray[np.float32], (disk / disk.sum()).astype(np.float32))


def gaussian_kernel(sigma_px: float) -> NDArray[np.float32]:
    """An isotropic Gaussian that sums to 1."""
    reach = max(1, int(np.ceil(3 * sigma_px)))
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma_px, 1e-3)) ** 2)
    kernel = np.outer(line, line)
    return cast(NDArray[np.float32], (kernel / kernel.sum()).astype(np.float32))


def add_other(image: FloatImage, rng: np.random.Generator) -> FloatImage:
    """JPEG of quality 5..25, defocus of radius 3..8 px, or enlargement from 1/4 to 1/2 of the sides."""
    kind = rng.integers(3)
    if kind == 0:
        return add_jpeg(image, quality=int(rng.integers(5, 26)))
    if kind == 1:
        return _clip(convolve(image, disk_kernel(float(rng.uniform(3, 8)))))
    height, width = image.shape[:2]
    factor = rng.uniform(0.25, 0.5)
    small = resize(image, max(1, round(height * factor)), max(1, round(width * factor)))
    return resize(small, height, width)


# Clean photographs as they come


def vary_clean(image: FloatImage, rng: np.random.Generator) -> FloatImage:
    """Harmless differences between undamaged photographs, all on the clean side of `CleanLimits`.

    Softness of camera originals (Gaussian below 0.7 px, or enlargement by at most a third) or sharpening as cameras and
    scanners do it, exposure and contrast as a photographer may choose them, the pale blacks of film and prints, a
    distance that fades a little, grain below sigma 3.
    """
    height, width = image.shape[:2]
    out = image
    kind = rng.random()
    if kind < 0.25:
        out = _clip(convolve(out, gaussian_kernel(float(rng.uniform(0.3, 0.7 * CLEAN_LIMITS.blur_px)))))
    elif kind < 0.4:
        factor = rng.uniform(CLEAN_LIMITS.scale, 1)
        out = resize(resize(out, round(height * factor), round(width * factor)), height, width)
    elif kind < 0.6:
        soft = convolve(out, gaussian_kernel(float(rng.uniform(0.5, 1.2))))
        out = _clip(out + np.float32(rng.uniform(0.2, 1.2)) * (out - soft))
    if rng.random() < 0.3:
        out = out ** np.float32(rng.uniform(0.75, 1.15))
    if rng.random() < 0.3:
        out = out * np.float32(rng.uniform(0.88, 1.0))
    if rng.random() < 0.15:
        out = _clip(out)
        steeper = out * out * (3 - 2 * out) - out
        darkest = float(CLEAN_LIMITS.exposure * image.mean() - out.mean())
        most = 1.0 if steeper.mean() >= 0 else min(1.0, max(0.0, darkest / float(steeper.mean())))
        out = out + np.float32(rng.uniform(0, most)) * steeper
    kind = rng.random()
    if kind < 0.25:
        black = rng.uniform(0, 0.14) * rng.uniform(0.4, 1, 3)
        black = black * min(1.0, (1 - CLEAN_LIMITS.transmission) / black.mean())
        out = black.astype(np.float32) + (1 - black.astype(np.float32)) * out
    elif kind < 0.4:
        depth = pseudo_depth(height, width, rng)[:, :, None]
        faded = depth * np.float32(rng.uniform(0, 1 - CLEAN_LIMITS.transmission) / depth.mean())
        out = out + faded * (np.float32(rng.uniform(0.65, 1)) - out)
    if rng.random() < 0.4:
        grain = add_noise if rng.random() < 0.5 else add_camera_noise
        out = grain(_clip(out), rng, sigma_255=float(rng.uniform(0, 0.6 * CLEAN_LIMITS.noise_sigma_255)))
    return _clip(out)


def degrade(image: FloatImage, label: Degradation, rng: np.random.Generator) -> tuple[FloatImage, float | None]:
    """A degraded version of a clean image under `label`, and the noise sigma (0..255 scale) where it is `noise`.

    A quarter of the noise is a camera's, whose sigma is what the estimator makes of it.
    """
    match label:
        case Degradation.NOISE:
            sigma_255 = draw_noise_sigma(rng)
            if rng.random() < 0.25:
                noisy = add_camera_noise(image, rng, sigma_255=sigma_255)
                return noisy, estimate_sigma(to_uint8(noisy))
            return add_noise(image, rng, sigma_255=sigma_255), sigma_255
        case Degradation.RAIN:
            return add_rain(image, rng), None
        case Degradation.HAZE:
            return add_haze(image, rng), None
        case Degradation.BLUR:
            return add_motion_blur(image, rng, wander=float(rng.choice([1.0, 4.0]))), None
        case Degradation.LOWLIGHT:
            return (add_deep_shadow if rng.random() < 0.4 else add_lowlight)(image, rng), None
        case Degradation.OTHER:
            return add_other(image, rng), None
        case Degradation.CLEAN:
            return vary_clean(image, rng), None
