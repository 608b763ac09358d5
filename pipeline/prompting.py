"""Which label leads to which prompt: decided here and nowhere else."""

NOISE_CUT_POINTS_255: tuple[float, float] = (19.0, 36.0)
"""Estimated sigma (0..255 scale) from which noise is restored under `noise25`, and under `noise50`."""


def noise_prompt(sigma_255: float) -> str:
    """The prompt key for noise of a standard deviation on the 0..255 scale."""
    low, high = NOISE_CUT_POINTS_255
    if sigma_255 < low:
        return "noise15"
    return "noise25" if sigma_255 < high else "noise50"
