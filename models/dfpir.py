"""DFPIR as published, in plain modules for training and as the oracle of the inference form.

Tian et al., "Degradation-Aware Feature Perturbation for All-in-One Image Restoration", CVPR 2025,
arXiv 2505.12630. State-dict keys are those of the released checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_DIM = 512
"""Length of a prompt's embedding: that of CLIP ViT-B/32's text tower."""


@dataclass(frozen=True)
class DFPIRConfig:
    """All that is needed to rebuild a DFPIR network; the defaults are the released one."""

    dim: int = 48
    num_blocks: tuple[int, int, int, int] = (4, 6, 6, 8)
    num_refinement_blocks: int = 4
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    ffn_expansion_factor: float = 2.66
    kept_fraction: float = 0.9
    """gamma: the share of each attention row that survives in CAAPM."""
    shuffle_expansion: int = 2
    """Channels of DGCPM's shuffle, as a multiple of its input's."""
    channel_perturbation: bool = True
    """Whether there is DGCPM."""
    attention_perturbation: bool = True
    """Whether there is CAAPM."""
    trained_guidance: bool = False
    """Whether gradients reach the guidance layers, as if a channel's place in the order were its strength
    (straight-through); as published they keep their initial values. The outputs are the same."""
    unshuffle_factor: int = 1
    """Pixel-unshuffle before the stem (and shuffle after the output): 1 as published, 2 for compact models."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_blocks", tuple(self.num_blocks))
        object.__setattr__(self, "heads", tuple(self.heads))
        if len(self.num_blocks) != 4 or len(self.heads) != 4:
            raise ValueError("num_blocks and heads need four entries, one per level")
        if min(self.heads) < 1 or min(self.num_blocks) < 1:
            raise ValueError(f"num_blocks and heads must be at least 1, not {self.num_blocks} and {self.heads}")
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim must be even and at least 2, as channels are halved between levels, not {self.dim}")
        if not 0 < self.kept_fraction <= 1:
            raise ValueError(f"kept_fraction must be in (0, 1], not {self.kept_fraction}")
        if self.shuffle_expansion < 1 or self.unshuffle_factor < 1:
            raise ValueError("shuffle_expansion and unshuffle_factor must be at least 1")
        for level, heads in enumerate(self.heads):
            if self.dim * 2**level % heads:
                raise ValueError(
                    f"level {level + 1} has {self.dim * 2**level} channels, not divisible by {heads} heads"
                )
            if int(self.dim * 2**level // heads * self.kept_fraction) < 1:
                raise ValueError(f"kept_fraction {self.kept_fraction} keeps nothing of a head at level {level + 1}")

    @property
    def is_ablation(self) -> bool:
        """Whether DGCPM or CAAPM is left out; the inference form does not run that."""
        return not (self.channel_perturbation and self.attention_perturbation)

    @property
    def size_multiple(self) -> int:
        """Both sides of an input must be multiples of this many pixels."""
        return 8 * self.unshuffle_factor


def channel_order(guidance: Tensor) -> Tensor:
    """Channel permutation for a guidance vector: indices by descending value.

    Args:
        guidance: B x C or C, float32. The order is fragile: never compute it in a lower precision.

    Returns:
        int64 of the same shape.
    """
    return guidance.sort(dim=-1, descending=True, stable=True).indices


def keep_largest(logits: Tensor, kept_fraction: float) -> Tensor:
    """Sets all but the largest `int(C * kept_fraction)` entries of each row (last dimension) to -inf."""
    kept = int(logits.shape[-1] * kept_fraction)
    if kept >= logits.shape[-1]:
        return logits
    top = logits.topk(kept, dim=-1).indices
    mask = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, top, False)
    return logits.masked_fill(mask, float("-inf"))


def _conv1x1(channels_in: int, channels_out: int, *, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=bias)


def _conv3x3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)


def _depthwise3x3(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False)


class _AffineBody(nn.Module):
    """Holds the affine part of a layer norm under the released key `body`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


class ChannelLayerNorm(nn.Module):
    """Layer norm with bias over the channels of a B C H W tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = _AffineBody(channels)

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        normed = F.layer_norm(channels_last, (x.shape[1],), self.body.weight, self.body.bias, 1e-5)
        return normed.permute(0, 3, 1, 2)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """B (heads C) H W -> B heads C (H W)."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, heads, channels // heads, height * width)


def _channel_logits(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    """Cosine similarity between channels, scaled: B heads C C."""
    return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * temperature


class GatedFeedForward(nn.Module):
    """GDFN of Restormer: 1x1 up, depth-wise 3x3, GELU gate, 1x1 down. B C H W in and out."""

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = _conv1x1(channels, hidden * 2)
        self.dwconv = _depthwise3x3(hidden * 2)
        self.project_out = _conv1x1(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        out: Tensor = self.project_out(F.gelu(gate) * value)
        return out


class ChannelSelfAttention(nn.Module):
    """MDTA of Restormer: self-attention between channels. B C H W in and out."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = _conv1x1(channels, channels * 3)
        self.qkv_dwconv = _depthwise3x3(channels * 3)
        self.project_out = _conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (_heads_first(t, self.heads) for t in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1))
        attention = _channel_logits(query, key, self.temperature).softmax(dim=-1)
        out: Tensor = self.project_out((attention @ value).reshape(x.shape))
        return out


class TransformerBlock(nn.Module):
    """Restormer's block: attention, then GDFN, each with a residual. B C H W in and out."""

    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels)
        self.attn = ChannelSelfAttention(channels, heads)
        self.norm2 = ChannelLayerNorm(channels)
        self.ffn = GatedFeedForward(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class PerturbedAttention(nn.Module):
    """CAAPM's cross-attention between channels: query from shuffled features, key and value from the original."""

    def __init__(self, channels: int, heads: int, kept_fraction: float) -> None:
        super().__init__()
        self.heads = heads
        self.kept_fraction = kept_fraction
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.attn4 = nn.Parameter(torch.full((1,), 0.2))
        self.kv = _conv1x1(channels, channels * 2)
        self.kv_dwconv = _depthwise3x3(channels * 2)
        self.q = _conv1x1(channels, channels)
        self.q_dwconv = _depthwise3x3(channels)
        self.project_out = _conv1x1(channels, channels)

    def forward(self, shuffled: Tensor, original: Tensor) -> Tensor:
        query = _heads_first(self.q_dwconv(self.q(shuffled)), self.heads)
        key, value = (_heads_first(t, self.heads) for t in self.kv_dwconv(self.kv(original)).chunk(2, dim=1))
        logits = keep_largest(_channel_logits(query, key, self.temperature), self.kept_fraction)
        attended = self.attn4 * (logits.softmax(dim=-1) @ value)
        out: Tensor = self.project_out(attended.reshape(original.shape))
        return out


class PerturbationBlock(nn.Module):
    """DGPB: channels shuffled by the prompt (DGCPM), then attention perturbed by them (CAAPM), paper section 3.

    The prompt acts through the order of a sort alone, so no gradient reaches `linear_layer1` and
    `linear_layer3`: they keep their initial values, unless `trained_guidance` lets a gradient through.
    """

    def __init__(self, channels: int, heads: int, config: DFPIRConfig) -> None:
        super().__init__()
        wide = channels * config.shuffle_expansion
        self.linear_layer1 = nn.Linear(TEXT_DIM, TEXT_DIM)
        self.linear_layer3 = nn.Linear(TEXT_DIM, wide)
        self.config = config
        for layer in (self.linear_layer1, self.linear_layer3):
            layer.requires_grad_(config.trained_guidance)
        self.conv1x1 = _conv1x1(channels, wide, bias=True)
        self.conv_out = _conv1x1(wide, channels, bias=True)
        self.norm1 = ChannelLayerNorm(channels)
        self.norm2 = ChannelLayerNorm(channels)
        self.norm3 = ChannelLayerNorm(channels)
        self.select_attn = PerturbedAttention(channels, heads, config.kept_fraction)
        self.ffn = GatedFeedForward(channels, config.ffn_expansion_factor)

    def guidance(self, text_embedding: Tensor) -> Tensor:
        """The vectors whose descending order each prompt stands for: B x 512 -> B x (expansion C) float32."""
        with torch.autocast(text_embedding.device.type, enabled=False):
            guidance: Tensor = self.linear_layer3(self.linear_layer1(text_embedding.float()))
        return guidance

    def permutations(self, text_embedding: Tensor) -> Tensor:
        """The channel order that each prompt stands for: B x 512 float32 -> B x (expansion C) int64."""
        return channel_order(self.guidance(text_embedding))

    def shuffle(self, x: Tensor, text_embedding: Tensor) -> Tensor:
        """DGCPM: widen, reorder the channels, narrow. B C H W in and out; the embedding is B x 512 float32."""
        wide = self.conv1x1(x)
        guidance = self.guidance(text_embedding)
        order = channel_order(guidance)
        if self.config.trained_guidance:
            # A factor of 1 whose gradient is the guidance's: a channel that should be stronger moves forward.
            wide = wide * (1 + guidance - guidance.detach()).to(wide.dtype)[:, :, None, None]
        index = order[:, :, None, None].expand(-1, -1, *wide.shape[2:])
        out: Tensor = self.conv_out(wide.gather(1, index))
        return out

    def forward(self, x: Tensor, text_embedding: Tensor) -> Tensor:
        shuffled = self.shuffle(x, text_embedding) if self.config.channel_perturbation else x
        attended = shuffled
        if self.config.attention_perturbation:
            attended = self.select_attn(self.norm1(shuffled), self.norm2(x))
        out: Tensor = attended + self.ffn(self.norm3(attended))
        return out


class Downsample(nn.Module):
    """Halves both sides and doubles the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv3x3(channels, channels // 2), nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class Upsample(nn.Module):
    """Doubles both sides and halves the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv3x3(channels, channels * 2), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


class PatchEmbed(nn.Module):
    """The stem: 3x3 convolution from image to features."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.proj = _conv3x3(channels_in, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class DFPIR(nn.Module):
    """Four-level encoder-decoder of Restormer with DGPB on the latent and on each skip connection.

    Called as `net(image, text_embedding)`: image B 3 H W, RGB in [0, 1], sides multiples of
    `config.size_multiple`; text_embedding B x 512. Returns B 3 H W, not clamped.
    """

    def __init__(self, config: DFPIRConfig) -> None:
        super().__init__()
        self.config = config
        c1, c2, c3, c4 = (config.dim * 2**level for level in range(4))
        h1, h2, h3, h4 = config.heads
        n1, n2, n3, n4 = config.num_blocks
        image_channels = 3 * config.unshuffle_factor**2

        def blocks(channels: int, heads: int, count: int) -> nn.Sequential:
            return nn.Sequential(
                *(TransformerBlock(channels, heads, config.ffn_expansion_factor) for _ in range(count))
            )

        self.patch_embed = PatchEmbed(image_channels, c1)
        self.encoder_level1 = blocks(c1, h1, n1)
        self.encoder_shuffle_channel1 = PerturbationBlock(c1, h1, config)
        self.down1_2 = Downsample(c1)
        self.encoder_level2 = blocks(c2, h2, n2)
        self.encoder_shuffle_channel2 = PerturbationBlock(c2, h2, config)
        self.down2_3 = Downsample(c2)
        self.encoder_level3 = blocks(c3, h3, n3)
        self.encoder_shuffle_channel3 = PerturbationBlock(c3, h3, config)
        self.down3_4 = Downsample(c3)
        self.latent = blocks(c4, h4, n4)
        self.latent_shuffle_channel = PerturbationBlock(c4, h4, config)
        self.up4_3 = Upsample(c4)
        self.reduce_chan_level3 = _conv1x1(c4, c3)
        self.decoder_level3 = blocks(c3, h3, n3)
        self.up3_2 = Upsample(c3)
        self.reduce_chan_level2 = _conv1x1(c3, c2)
        self.decoder_level2 = blocks(c2, h2, n2)
        self.up2_1 = Upsample(c2)
        self.decoder_level1 = blocks(c2, h1, n1)
        self.refinement = blocks(c2, h1, config.num_refinement_blocks)
        self.output = _conv3x3(c2, image_channels)

    def forward(self, image: Tensor, text_embedding: Tensor) -> Tensor:
        factor = self.config.unshuffle_factor
        level1 = self.encoder_level1(self.patch_embed(F.pixel_unshuffle(image, factor)))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        latent = self.latent(self.down3_4(level3))

        x = self.up4_3(self.latent_shuffle_channel(latent, text_embedding))
        x = torch.cat([x, self.encoder_shuffle_channel3(level3, text_embedding)], dim=1)
        x = self.up3_2(self.decoder_level3(self.reduce_chan_level3(x)))
        x = torch.cat([x, self.encoder_shuffle_channel2(level2, text_embedding)], dim=1)
        x = self.up2_1(self.decoder_level2(self.reduce_chan_level2(x)))
        x = torch.cat([x, self.encoder_shuffle_channel1(level1, text_embedding)], dim=1)
        x = self.refinement(self.decoder_level1(x))
        out: Tensor = F.pixel_shuffle(self.output(x), factor) + image
        return out
