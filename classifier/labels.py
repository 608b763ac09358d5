"""The closed set of degradations, and the numbers that say where damage begins."""

from dataclasses import dataclass
from enum import StrEnum


class Degradation(StrEnum):
    """What may be wrong with a photograph; the order is that of the classifier's outputs."""

    NOISE = "noise"
    RAIN = "rain"
    HAZE = "haze"
    BLUR = "blur"
    LOWLIGHT = "lowlight"
    CLEAN = "clean"
    OTHER = "other"
    """Damage that has no prompt: JPEG blocks, defocus, low resolution."""


LABELS: tuple[Degradation, ...] = tuple(Degradation)


@dataclass(frozen=True)
class CleanLimits:
    """A photograph is `clean` while every figure stays on the clean side of these limits.

    Synthesis draws clean examples within them and damaged ones beyond them.
    """

    noise_sigma_255: float = 5.0
    """Gaussian noise below this standard deviation, on the 0..255 scale."""
    blur_px: float = 1.0
    """Standard deviation of a blur kernel along its longest axis, in pixels, below this."""
    transmission: float = 0.9
    """Mean transmission of the haze model above this."""
    exposure: float = 0.6
    """Mean brightness relative to the well exposed photograph above this."""
    jpeg_quality: int = 60
    """JPEG quality (libjpeg scale) from this up."""
    scale: float = 0.75
    """A photograph enlarged from at least this fraction of its sides still counts as clean."""


CLEAN_LIMITS = CleanLimits()
