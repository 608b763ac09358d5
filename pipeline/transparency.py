"""What alpha hides altogether, filled from what can be seen: whatever colours stand there belong to no picture."""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray


def completed(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """The picture that classifier and restorer are to see, H x W x 3.

    Where alpha (H x W) is 0 each row goes on mirrored at the edge of what can be seen in it, and rows in which nothing
    can be seen mirror the others: texture, noise and the direction of a blur stay what they are. A picture of which
    nothing is hidden, or all, comes back as it is.
    """
    seen = alpha > 0
    if seen.all() or not seen.any():
        return pixels
    filled = pixels.copy()
    rows: NDArray[np.bool_] = np.any(seen, axis=1)
    for row in np.flatnonzero(rows & ~np.all(seen, axis=1)):
        filled[row] = pixels[row, _shown(seen[row])]
    return filled if rows.all() else filled[_shown(rows)]


def _shown(seen: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Which place of a line each place shows: itself if it is seen, else one mirrored at the last seen before it."""
    places, there = np.arange(len(seen)), np.flatnonzero(seen)
    before = np.searchsorted(there, places)
    last = there[np.maximum(before - 1, 0)]  # for the places before all that are seen, the first of these
    rank = np.where(seen, before, np.where(places < there[0], last - places - 1, before - (places - last)))
    rank %= 2 * len(there)
    return cast(NDArray[np.intp], there[np.minimum(rank, 2 * len(there) - 1 - rank)])
