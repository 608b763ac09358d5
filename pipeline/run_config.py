"""What a run is: the options that can change an output, and where it lies."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ALGORITHM_VERSION = 16
"""Raised when the same options come to give different pixels or decisions."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that can change an output, resolved; its digest stands in every row.

    Workers, engine, device count and shard size are not here: they may change between a run and its resumption.
    """

    model: str
    weights_sha256: str
    classifier: str
    classifier_sha256: str
    label: str
    """`auto`, or the label that every image is restored under."""
    noise_sigma_255: float | None
    """Forced noise standard deviation on the 0..255 scale, from `--label noise:SIGMA`."""
    reference: str | None
    """Directory of references, matched by relative path without extension."""
    output_format: str
    """`same`, `png`, `jpeg` or `webp`."""
    quality: int
    clean: str
    """What becomes of images that need no restoring: `copy`, `link` or `skip`."""
    dtype: str
    """`float32` or `bfloat16`: already resolved."""
    tile: str
    """`auto`, `off`, or a side in pixels."""
    min_confidence: float | None
    """Replaces the classifier's own thresholds where given."""
    second_look: bool
    """Whether results are classified too."""
    max_pixels: int
    """A larger image is refused as a decompression bomb."""
    algorithm_version: int = ALGORITHM_VERSION

    @property
    def digest(self) -> str:
        """128 bits over all fields, in hexadecimal."""
        return digest_of(asdict(self))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """One line per field in which a stored configuration differs from this one, named as its option is."""
        return [
            f"{name.removeprefix('output_')}: was {other.get(name)!r}, is now {value!r}"
            for name, value in asdict(self).items()
            if other.get(name) != value
        ]


def digest_of(config: Mapping[str, Any]) -> str:
    """The digest of a configuration as `job.json` holds it, be it of another version with other fields."""
    text = json.dumps(config, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Everything that a worker needs to know of its run; picklable."""

    run_id: str
    run_dir: str
    source_root: str
    config: RunConfig
    code_version: str
    device: str
    """`cpu` or `cuda`: already resolved."""
    threads: int
    """CPU threads of the submitting machine, and of each worker once a runner has shared them out."""
    least_gpu_bytes: int
    """Of a GPU that several workers share, each has so much memory at least."""
    sharers: int = 1
    """Workers that have the memory of a device together."""
    reserved: frozenset[str] = frozenset()
    """Relative paths of planned images, in the source still or not, that another one's result could have."""
    commit_every_s: float = 60.0
    patience_s: float = 1800.0
    """Seconds without headway after which a worker is ended (see `pipeline.watchdog`)."""
