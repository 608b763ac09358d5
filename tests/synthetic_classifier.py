"""A tiny classifier with random weights, for tests of what stands around a classifier."""

from pathlib import Path

import torch

from classifier.architecture import Architecture
from classifier.labels import LABELS
from classifier.network import DegradationNetwork
from classifier.view import ViewSettings
from classifier.weights import save_classifier

TINY = Architecture(
    stem_width=8, crop_channels=(8, 8, 8, 8), thumbnail_channels=(8, 8, 8, 8), spectrum_channels=(8, 8), hidden=8
)
TINY_VIEW = ViewSettings(crop_px=32, crops=2, thumbnail_px=32)


def write_tiny_classifier(path: Path) -> Path:
    """Writes the same random weights every time; every prediction is confident."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DegradationNetwork(TINY, crop_px=TINY_VIEW.crop_px)
    save_classifier(
        path,
        network,
        view=TINY_VIEW,
        temperature=1.0,
        thresholds=dict.fromkeys(LABELS, 0.0),
        licence="CC0-1.0",
        provenance={"training": "none: random weights for tests"},
    )
    return path
