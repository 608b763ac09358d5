"""The shipped classifier's network: two small timm backbones, for crops and for the thumbnail, and one head."""

from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classifier.labels import LABELS

UNSHUFFLE = 2
"""Pixels of each 2 x 2 block become channels: the finest pixels are seen at a quarter of the cost."""

RESIDUAL_GAIN = 8.0
"""Lifts noise of a few levels of 255 to where tanh still tells it from noise of fifty."""


@dataclass(frozen=True)
class Architecture:
    """All that is needed to rebuild the network."""

    backbone: str = "resnet10t"
    """A timm model of the ResNet family."""
    stem_width: int = 32
    crop_channels: tuple[int, ...] = (64, 96, 128, 192)
    thumbnail_channels: tuple[int, ...] = (32, 64, 96, 128)
    hidden: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_channels", tuple(self.crop_channels))
        object.__setattr__(self, "thumbnail_channels", tuple(self.thumbnail_channels))

    def as_dict(self) -> dict[str, Any]:
        """The architecture as JSON-ready keyword arguments of `Architecture`."""
        return asdict(self)


def finest_pixels(image: Tensor) -> Tensor:
    """B x 3 x H x W in [0, 1] -> B x 24 x H/2 x W/2: colour, and its amplified residual against a 3 x 3 mean."""
    mean = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    residual = torch.tanh((image - mean) * RESIDUAL_GAIN)
    return F.pixel_unshuffle(torch.cat([image * 2 - 1, residual], dim=1), UNSHUFFLE)


class DegradationNetwork(nn.Module):
    """Called as `net(crops, thumbnails)`: B x N x 3 x P x P and B x 3 x T x T, RGB in [0, 1], P and T even.

    Returns logits, B x labels in the order of `LABELS`.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

        def backbone(channels: tuple[int, ...]) -> nn.Module:
            return timm.create_model(
                architecture.backbone,
                pretrained=False,
                num_classes=0,
                in_chans=6 * UNSHUFFLE**2,
                stem_width=architecture.stem_width,
                channels=channels,
            )

        self.crop_backbone = backbone(architecture.crop_channels)
        self.thumbnail_backbone = backbone(architecture.thumbnail_channels)
        features = 2 * architecture.crop_channels[-1] + architecture.thumbnail_channels[-1]
        self.head = nn.Sequential(
            nn.Dropout(0.1),
            nn.Linear(features, architecture.hidden),
            nn.ReLU(),
            nn.Linear(architecture.hidden, len(LABELS)),
        )

    def forward(self, crops: Tensor, thumbnails: Tensor) -> Tensor:
        batch, count = crops.shape[:2]
        seen: Tensor = self.crop_backbone(finest_pixels(crops.flatten(0, 1))).view(batch, count, -1)
        whole: Tensor = self.thumbnail_backbone(finest_pixels(thumbnails))
        logits: Tensor = self.head(torch.cat([seen.mean(dim=1), seen.amax(dim=1), whole], dim=1))
        return logits


def to_input(pixels: Tensor) -> Tensor:
    """uint8 ... x H x W x 3 -> float32 ... x 3 x H x W in [0, 1], channels last in memory."""
    return pixels.movedim(-1, -3).float() / 255
