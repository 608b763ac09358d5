"""The shape of the shipped classifier's network, apart from it: a configuration needs no timm, which takes seconds."""

from dataclasses import dataclass

STAGES = 4
"""Of a ResNet."""


@dataclass(frozen=True)
class Architecture:
    """All that is needed to rebuild the network."""

    backbone: str = "resnet10t"
    """A timm model of the ResNet family."""
    stem_width: int = 32
    crop_channels: tuple[int, ...] = (64, 96, 128, 192)
    thumbnail_channels: tuple[int, ...] = (32, 64, 96, 128)
    """Of a backbone for thumbnails alone; empty: they go through that of the crops, whose size they must have."""
    spectrum_channels: tuple[int, ...] = (24, 48, 64, 64)
    hidden: int = 128

    def __post_init__(self) -> None:
        for name in ("crop_channels", "thumbnail_channels", "spectrum_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.crop_channels) != STAGES or len(self.thumbnail_channels) not in (0, STAGES):
            raise ValueError(f"crop_channels are {STAGES}, thumbnail_channels as many or none")
        if not self.spectrum_channels:
            raise ValueError("spectrum_channels are one or more")
        channels = (*self.crop_channels, *self.thumbnail_channels, *self.spectrum_channels)
        if min(self.stem_width, self.hidden, *channels) < 1:
            raise ValueError("widths are at least 1")
