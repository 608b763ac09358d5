"""The shipped classifier's network: a small timm backbone for crops and thumbnail, a spectrum, and one head."""

import copy
from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from classifier.architecture import Architecture
from classifier.labels import LABELS

UNSHUFFLE = 2
"""Pixels of each 2 x 2 block become channels: the finest pixels are seen at a quarter of the cost."""

RESIDUAL_GAIN = 8.0
"""Lifts noise of a few levels of 255 to where tanh still tells it from noise of fifty."""

FAINTEST_POWER = 0.1
"""Added to a power spectrum of white noise of variance 1 on the 0..255 scale: about that of rounding to levels."""


class FinestPixels(nn.Module):
    """B x 3 x H x W on the 0..255 scale -> B x 24 x H/2 x W/2 in [-1, 1]: colour, and its amplified residual.

    The residual is against the mean of 3 x 3 pixels. One fixed convolution does both, in float32 whatever the autocast:
    rounded weights would let brightness leak into the residual.
    """

    kernel: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.zeros(2, 3, UNSHUFFLE, UNSHUFFLE, 3, UNSHUFFLE + 2, UNSHUFFLE + 2)
        for channel in range(3):
            for row in range(UNSHUFFLE):
                for column in range(UNSHUFFLE):
                    colour, residual = kernel[:, channel, row, column, channel]
                    colour[row + 1, column + 1] = 2 / 255
                    residual[row : row + 3, column : column + 3] = -1 / 9 * RESIDUAL_GAIN / 255
                    residual[row + 1, column + 1] = 8 / 9 * RESIDUAL_GAIN / 255
        bias = torch.tensor([-1.0, 0.0]).repeat_interleave(3 * UNSHUFFLE**2)
        self.register_buffer("kernel", kernel.flatten(0, 3), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """The features of an image, in float32."""
        with torch.autocast(image.device.type, enabled=False):
            both = F.conv2d(image, self.kernel, self.bias, stride=UNSHUFFLE, padding=1)
            residual = both.chunk(2, dim=1)[1]
            # tanh, off by 2e-7 at most; the function itself, on a part of the channels, takes three times as long.
            residual.copy_((2 * residual).sigmoid_().mul(2).sub_(1))
            return both


class PowerSpectrum(nn.Module):
    """B x N x 3 x P x P on the 0..255 scale -> B x 2 x P x (P/2 + 1): the crops' common log power spectrum.

    A blur multiplies the spectrum of every crop by that of its kernel, noise adds a floor, rain an orientation and
    enlargement an edge, while what the crops show averages out: the arithmetic mean is led by the most textured
    crop, the geometric one by all alike. Natural images fall with the square of the frequency (Field, "Relations
    between the statistics of natural images and the response properties of cortical cells", 1987), so that this
    fall is taken off. In float32 whatever the autocast: a spectrum spans ten orders of magnitude.
    """

    window: Tensor
    fall: Tensor

    def __init__(self, side_px: int) -> None:
        super().__init__()
        line = torch.hann_window(side_px, periodic=False)
        window = line[:, None] * line
        frequency = torch.hypot(torch.arange(side_px)[:, None] - side_px / 2, torch.arange(side_px // 2 + 1))
        self.register_buffer("window", window / window.square().sum().sqrt(), persistent=False)
        self.register_buffer("fall", 2 * frequency.clamp(min=1).log(), persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        """The spectra, the lowest frequency in the middle of the first column."""
        with torch.autocast(crops.device.type, enabled=False):
            red, green, blue = crops.float().unbind(dim=2)
            luminance = (red + green + blue) / 3  # a mean over strided colours takes five times as long
            luminance = luminance - luminance.mean(dim=(-2, -1), keepdim=True)
            spectrum = torch.fft.rfft2(luminance * self.window)
            power = spectrum.real.square() + spectrum.imag.square() + FAINTEST_POWER  # `abs` takes a square root
            both = torch.stack([power.mean(dim=1).log(), power.log().mean(dim=1)], dim=1)
            return both.roll(crops.shape[-2] // 2, dims=-2) + self.fall


def _width(backbone: nn.Module) -> int:
    """The number of features that a timm model gives: more than its last channels, where it has bottlenecks."""
    width = backbone.num_features
    assert isinstance(width, int)
    return width


class DegradationNetwork(nn.Module):
    """Called as `net(crops, thumbnails)`; the crops of an image are pooled by their mean and their maximum.

    `crop_px`, the side of the crops, fixes the number of frequencies that the head sees.

    Small images, which look otherwise (`Views.small`), may have a last layer of their own: `small_output`.
    """

    small_output: nn.Linear | None

    def __init__(self, architecture: Architecture, *, crop_px: int) -> None:
        super().__init__()
        self.architecture = architecture

        if not timm.is_model(architecture.backbone):  # `hf-hub:...` would ask for it over the network
            raise ValueError(f"timm has no model {architecture.backbone}")

        def backbone(channels: tuple[int, ...]) -> nn.Module:
            return timm.create_model(
                architecture.backbone,
                pretrained=False,
                num_classes=0,
                in_chans=6 * UNSHUFFLE**2,
                stem_width=architecture.stem_width,
                channels=channels,
            )

        self.front = FinestPixels()
        self.crop_backbone = backbone(architecture.crop_channels)
        self.thumbnail_backbone = backbone(architecture.thumbnail_channels) if architecture.thumbnail_channels else None
        self.power_spectrum = PowerSpectrum(crop_px)
        stages: list[nn.Module] = [nn.BatchNorm2d(2)]
        for before, after in pairwise((2, *architecture.spectrum_channels)):
            stages += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.spectrum_backbone = nn.Sequential(*stages, nn.Flatten(), nn.Dropout(0.3))
        halved = 2 ** len(architecture.spectrum_channels)
        frequencies = -(-crop_px // halved) * -(-(crop_px // 2 + 1) // halved)
        features = 2 * _width(self.crop_backbone) + _width(self.thumbnail_backbone or self.crop_backbone)
        features += architecture.spectrum_channels[-1] * frequencies
        output = nn.Linear(architecture.hidden, len(LABELS))
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(features, architecture.hidden), nn.ReLU(), output)
        self.register_module("small_output", None)

    @property
    def output(self) -> nn.Linear:
        """The last layer, from what `hidden` gives to logits in the order of `LABELS`."""
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        return last

    def forward(self, crops: Tensor, thumbnails: Tensor, small: Tensor | None = None) -> Tensor:
        """Logits, B x labels in the order of `LABELS`.

        Args:
            crops: B x N x 3 x P x P, RGB on the 0..255 scale, P = `crop_px`, even.
            thumbnails: B x 3 x T x T, RGB on the 0..255 scale, T even; T = P without a backbone of their own.
            small: B, bool: which go through `small_output`, if there is one; none by default.
        """
        hidden = self.hidden(crops, thumbnails)
        logits: Tensor = self.output(hidden)
        if small is None or self.small_output is None:
            return logits
        return torch.where(small[:, None], self.small_output(hidden), logits)

    def hidden(self, crops: Tensor, thumbnails: Tensor) -> Tensor:
        """What the last layer sees, B x `Architecture.hidden`."""
        batch, count = crops.shape[:2]
        dtype = next(self.crop_backbone.parameters()).dtype
        views = [crops.flatten(0, 1), thumbnails]
        if self.thumbnail_backbone is None:  # all in one batch
            features: Tensor = self.crop_backbone(self.front(torch.cat(views)).to(dtype))
            seen, whole = features[:-batch], features[-batch:]
        else:
            backbones = self.crop_backbone, self.thumbnail_backbone
            seen, whole = (net(self.front(view).to(dtype)) for net, view in zip(backbones, views, strict=True))
        seen = seen.view(batch, count, -1)
        spectrum: Tensor = self.spectrum_backbone(self.power_spectrum(crops))
        found: Tensor = self.head[:-1](torch.cat([seen.mean(dim=1), seen.amax(dim=1), whole, spectrum], dim=1))
        return found


def inference_form(network: DegradationNetwork, dtype: torch.dtype) -> DegradationNetwork:
    """A copy for predictions alone: batch norms folded into the convolutions before them, channels last.

    What crops and thumbnail go through, most of the work, runs in `dtype`; the rest stays float32.
    """
    form = copy.deepcopy(network).eval().requires_grad_(False)
    unfolded = ""
    for name, module in list(form.named_modules()):
        if isinstance(module, nn.Conv2d):
            unfolded = name
        elif isinstance(module, nn.BatchNorm2d) and unfolded:
            convolution = form.get_submodule(unfolded)
            assert isinstance(convolution, nn.Conv2d)
            form.set_submodule(unfolded, fuse_conv_bn_eval(convolution, module))
            form.set_submodule(name, nn.Identity())
            unfolded = ""
    for part in (form.crop_backbone, form.thumbnail_backbone):
        if part is not None:
            part.to(dtype)
    return form.to(memory_format=torch.channels_last)


def to_input(pixels: Tensor) -> Tensor:
    """uint8 ... x H x W x 3 -> float32 ... x 3 x H x W on the 0..255 scale, channels last in memory."""
    return pixels.movedim(-1, -3).float()
