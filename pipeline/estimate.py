"""What a run will take: pixels and disk, from a sample of the headers of its images."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.images import Header, ImageFault, encoded_format, read_header
from pipeline.source import local_path

SAMPLE_IMAGES = 1_000
"""So many headers are read at most."""

BYTES_PER_PIXEL = {"JPEG": 0.7, "PNG": 1.9, "WEBP": 0.5, "TIFF": 2.0, "BMP": 3.0, "PPM": 3.0}
"""Typical size of a restored colour photograph at the default quality, by Pillow's name of the format."""


@dataclass(frozen=True)
class Estimate:
    """What a run is likely to take, extrapolated from the headers of `sampled` of its images."""

    sampled: int
    unreadable: int
    megapixels: float
    output_bytes: int

    @property
    def unreadable_fraction(self) -> float:
        """Share of the sample whose header could not be read."""
        return self.unreadable / self.sampled if self.sampled else 0.0


def estimate(uris: pa.ChunkedArray, *, output_format: str = "same") -> Estimate:
    """Size of the work and disk for its outputs, from the headers of a random sample, the same in each call.

    Args:
        uris: of the images to be done.
        output_format: `same`, `png`, `jpeg` or `webp`.
    """
    headers: list[Header] = []
    rng = np.random.default_rng(0)
    sampled = min(SAMPLE_IMAGES, len(uris))
    for index in sorted(rng.choice(len(uris), size=sampled, replace=False)):
        path = local_path(uris[index].as_py())
        try:
            if path.is_file():  # a named pipe would have no end
                with path.open("rb") as file:
                    headers.append(read_header(file))
        except (ImageFault, OSError):
            continue
    scale = len(uris) / sampled if sampled else 0.0
    megapixels = [header.width * header.height / 1e6 for header in headers]
    written = sum(
        size * 1e6 * BYTES_PER_PIXEL[encoded_format(header.format, output_format)]
        for size, header in zip(megapixels, headers, strict=True)
    )
    return Estimate(
        sampled=sampled,
        unreadable=sampled - len(headers),
        megapixels=sum(megapixels) * scale,
        output_bytes=round(written * scale),
    )
