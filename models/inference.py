"""The inference form of DFPIR: the same function of the same weights, arranged for speed.

Differences from the plain form in `models.dfpir`, none of which changes the result beyond rounding:

- Features are B x H x W x C throughout, so that a 1x1 convolution is one matrix product over all pixels.
- Prompts are indices into the bank. Each prompt's channel order is computed once, and folds DGCPM's two
  convolutions into one C x C matrix per prompt; every image of a batch picks its own.
- The affine part of a layer norm is folded into the projection that follows it.
- Queries and keys are not normalised pixel by pixel: their norms divide the C x C logits.
- Attention and the output projection merge into one C x C matrix per image, applied to the values.
- Reducing a concatenation is the sum of two products, without the concatenation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dfpir import (
    DFPIR,
    ChannelLayerNorm,
    ChannelSelfAttention,
    Downsample,
    GatedFeedForward,
    PerturbationBlock,
    PerturbedAttention,
    TransformerBlock,
    Upsample,
    keep_largest,
)
from models.prompts import PromptBank, prompt_permutations


def _matrix(convolution: nn.Module) -> Tensor:
    """The C_out x C_in matrix of a 1x1 convolution, float64: weights are merged in that precision."""
    assert isinstance(convolution, nn.Conv2d)
    return convolution.weight.detach().double().flatten(1)


def _normalise(x: Tensor) -> Tensor:
    """Layer norm over the last dimension without its affine part; statistics are float32 inside."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def _channels_last(x: Tensor) -> Tensor:
    """B x C x H x W as contiguous B x H x W x C; no copy where a kernel already kept channels last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _add_product(x: Tensor, features: Tensor, weight: Tensor) -> Tensor:
    """Adds features @ weight.T to x in one product; x is B x H x W x C_out, features B x H x W x C_in."""
    return torch.addmm(x.flatten(0, 2), features.flatten(0, 2), weight.T).view(x.shape)


def _gram_logits(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
    """Scaled cosine similarities between channels, B x heads x C x C, float32 whatever the features' dtype.

    Rounding the Gram matrix to bfloat16 would change which logits survive in CAAPM.

    Args:
        query: B x N x (heads C), N pixels.
        key: as `query`.
        temperature: heads x 1 x 1, float32.
    """
    batch, pixels, channels = query.shape
    heads = temperature.shape[0]
    query, key = (t.float().view(batch, pixels, heads, channels // heads).permute(0, 2, 3, 1) for t in (query, key))
    gram = query @ key.transpose(-2, -1)
    query_norm = query.square().sum(-1).sqrt_().clamp_min_(1e-12)
    key_norm = key.square().sum(-1).sqrt_().clamp_min_(1e-12)
    return gram / query_norm[..., :, None] / key_norm[..., None, :] * temperature


def _merge_output(attention: Tensor, project_out: Tensor) -> Tensor:
    """The output projection after attention as one matrix per image: B x C x C, float32.

    Args:
        attention: B x heads x C_head x C_head, float32.
        project_out: C x C, float32.
    """
    batch, heads, _, per_head = attention.shape
    columns = project_out.view(-1, heads, per_head).transpose(0, 1)
    return (columns @ attention).transpose(1, 2).reshape(batch, -1, heads * per_head)


class _Convolution(nn.Module):
    """A 3x3 convolution without bias, dense or depth-wise, on B x H x W x C."""

    weight: Tensor

    def __init__(self, plain: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(plain, nn.Conv2d)
        self.groups = plain.groups
        weight = plain.weight.detach().to(dtype, memory_format=torch.channels_last, copy=True)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(x.permute(0, 3, 1, 2), self.weight, padding=1, groups=self.groups)
        return _channels_last(out)


class _Folded(nn.Module):
    """A layer norm's affine part and the 1x1 convolution after it, as one weight and bias."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: ChannelLayerNorm, convolution: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        matrix = _matrix(convolution)
        self.register_buffer("weight", (matrix * norm.body.weight.detach().double()).to(dtype))
        self.register_buffer("bias", (matrix @ norm.body.bias.detach().double()).to(dtype))

    def forward(self, normalised: Tensor) -> Tensor:
        return F.linear(normalised, self.weight, self.bias)


class _FeedForward(nn.Module):
    """x + GDFN(norm(x)); B x H x W x C in and out."""

    project_out: Tensor

    def __init__(self, norm: ChannelLayerNorm, plain: GatedFeedForward, dtype: torch.dtype) -> None:
        super().__init__()
        self.project_in = _Folded(norm, plain.project_in, dtype)
        self.depthwise = _Convolution(plain.dwconv, dtype)
        self.register_buffer("project_out", _matrix(plain.project_out).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.depthwise(self.project_in(_normalise(x))).chunk(2, dim=-1)
        # On a strided half the CPU's GELU falls back to a scalar loop, three times slower than copy and all.
        return _add_product(x, F.gelu(gate.contiguous()).mul_(value), self.project_out)


class _SelfAttention(nn.Module):
    """x + MDTA(norm(x)); B x H x W x C in and out."""

    temperature: Tensor
    project_out: Tensor

    def __init__(self, norm: ChannelLayerNorm, plain: ChannelSelfAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv = _Folded(norm, plain.qkv, dtype)
        self.depthwise = _Convolution(plain.qkv_dwconv, dtype)
        self.register_buffer("temperature", plain.temperature.detach().float())
        self.register_buffer("project_out", _matrix(plain.project_out).float())

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.depthwise(self.qkv(_normalise(x))).flatten(1, 2).chunk(3, dim=-1)
        attention = _gram_logits(query, key, self.temperature).softmax(dim=-1)
        merged = _merge_output(attention, self.project_out).to(x.dtype)
        return torch.baddbmm(x.flatten(1, 2), value, merged.transpose(1, 2)).view(x.shape)


class _PerturbedAttention(nn.Module):
    """CAAPM's attention on normalised features; B x H x W x C in and out."""

    temperature: Tensor
    project_out: Tensor

    def __init__(self, block: PerturbationBlock, dtype: torch.dtype) -> None:
        super().__init__()
        plain: PerturbedAttention = block.select_attn
        self.kept_fraction = plain.kept_fraction
        self.query = _Folded(block.norm1, plain.q, dtype)
        self.key_value = _Folded(block.norm2, plain.kv, dtype)
        self.query_depthwise = _Convolution(plain.q_dwconv, dtype)
        self.key_value_depthwise = _Convolution(plain.kv_dwconv, dtype)
        self.register_buffer("temperature", plain.temperature.detach().float())
        scaled = _matrix(plain.project_out) * plain.attn4.detach().double()
        self.register_buffer("project_out", scaled.float())

    def forward(self, shuffled: Tensor, original: Tensor) -> Tensor:
        query = self.query_depthwise(self.query(_normalise(shuffled))).flatten(1, 2)
        key_value = self.key_value_depthwise(self.key_value(_normalise(original)))
        key, value = key_value.flatten(1, 2).chunk(2, dim=-1)
        logits = keep_largest(_gram_logits(query, key, self.temperature), self.kept_fraction)
        merged = _merge_output(logits.softmax(dim=-1), self.project_out).to(original.dtype)
        return torch.bmm(value, merged.transpose(1, 2)).view(original.shape)


class _Perturbation(nn.Module):
    """DGPB with the channel orders of a bank of K prompts folded in; B x H x W x C in and out."""

    matrices: Tensor
    """K x C x C: `W_out P W_in` for each prompt's permutation P."""
    biases: Tensor
    """K x C: `W_out P b_in + b_out`."""

    def __init__(self, plain: PerturbationBlock, orders: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        widen, narrow = _matrix(plain.conv1x1), _matrix(plain.conv_out)
        assert plain.conv1x1.bias is not None
        assert plain.conv_out.bias is not None
        widen_bias, narrow_bias = plain.conv1x1.bias.detach().double(), plain.conv_out.bias.detach().double()
        matrices = torch.stack([narrow @ widen[order] for order in orders])
        biases = torch.stack([narrow @ widen_bias[order] + narrow_bias for order in orders])
        self.register_buffer("matrices", matrices.to(dtype))
        self.register_buffer("biases", biases.to(dtype))
        self.attention = _PerturbedAttention(plain, dtype)
        self.feed_forward = _FeedForward(plain.norm3, plain.ffn, dtype)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        matrices, biases = self.matrices[prompts], self.biases[prompts]
        shuffled = torch.baddbmm(biases[:, None], x.flatten(1, 2), matrices.transpose(1, 2)).view(x.shape)
        out: Tensor = self.feed_forward(self.attention(shuffled, x))
        return out


def _blocks(plain: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    """Restormer's blocks, each as attention and feed-forward with their residuals."""
    layers: list[nn.Module] = []
    for block in plain:
        assert isinstance(block, TransformerBlock)
        layers += [_SelfAttention(block.norm1, block.attn, dtype), _FeedForward(block.norm2, block.ffn, dtype)]
    return nn.Sequential(*layers)


class _Resample(nn.Module):
    """3x3 convolution, then halves or doubles both sides; B x H x W x C in and out."""

    def __init__(self, plain: Downsample | Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolution = _Convolution(plain.body[0], dtype)
        self.rearrange = plain.body[1]

    def forward(self, x: Tensor) -> Tensor:
        return _channels_last(self.rearrange(self.convolution(x).permute(0, 3, 1, 2)))


class _Reduction(nn.Module):
    """The 1x1 convolution over a concatenation of features and skip, as two products; B x H x W x C."""

    from_features: Tensor
    from_skip: Tensor

    def __init__(self, plain: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        from_features, from_skip = _matrix(plain).chunk(2, dim=1)
        self.register_buffer("from_features", from_features.to(dtype))
        self.register_buffer("from_skip", from_skip.to(dtype))

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        return _add_product(F.linear(features, self.from_features), skip, self.from_skip)


class InferenceDFPIR(nn.Module):
    """DFPIR for a fixed bank of prompts, without gradients.

    Called as `net(image, prompts)`: image B 3 H W, float32, RGB in [0, 1], sides multiples of
    `config.size_multiple`; prompts B int64, positions in the bank. Returns B 3 H W float32, not clamped.

    With `dtype` bfloat16 the features are bfloat16, while Gram matrices, softmax, the choice of surviving
    logits, layer norm's statistics and the final sum with the image stay float32.
    """

    def __init__(self, network: DFPIR, bank: PromptBank, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = network.config
        self.dtype = dtype
        orders = bank.permutations or prompt_permutations(network, bank.embeddings)

        def perturbation(name: str) -> _Perturbation:
            plain = network.get_submodule(name)
            assert isinstance(plain, PerturbationBlock)
            return _Perturbation(plain, orders[name], dtype)

        self.stem = _Convolution(network.patch_embed.proj, dtype)
        self.encoder1 = _blocks(network.encoder_level1, dtype)
        self.perturb1 = perturbation("encoder_shuffle_channel1")
        self.down1 = _Resample(network.down1_2, dtype)
        self.encoder2 = _blocks(network.encoder_level2, dtype)
        self.perturb2 = perturbation("encoder_shuffle_channel2")
        self.down2 = _Resample(network.down2_3, dtype)
        self.encoder3 = _blocks(network.encoder_level3, dtype)
        self.perturb3 = perturbation("encoder_shuffle_channel3")
        self.down3 = _Resample(network.down3_4, dtype)
        self.latent = _blocks(network.latent, dtype)
        self.perturb4 = perturbation("latent_shuffle_channel")
        self.up4 = _Resample(network.up4_3, dtype)
        self.reduce3 = _Reduction(network.reduce_chan_level3, dtype)
        self.decoder3 = _blocks(network.decoder_level3, dtype)
        self.up3 = _Resample(network.up3_2, dtype)
        self.reduce2 = _Reduction(network.reduce_chan_level2, dtype)
        self.decoder2 = _blocks(network.decoder_level2, dtype)
        self.up2 = _Resample(network.up2_1, dtype)
        self.decoder1 = _blocks(network.decoder_level1, dtype)
        self.refinement = _blocks(network.refinement, dtype)
        self.output = _Convolution(network.output, dtype)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, prompts: Tensor) -> Tensor:
        """Restores a batch; shapes and ranges stand at the class."""
        factor = self.config.unshuffle_factor
        x = self.encoder1(self.stem(_channels_last(F.pixel_unshuffle(image, factor)).to(self.dtype)))
        # A skip connection's perturbation runs at once, so that only its result is kept until the decoder.
        skip1, x = self.perturb1(x, prompts), self.encoder2(self.down1(x))
        skip2, x = self.perturb2(x, prompts), self.encoder3(self.down2(x))
        skip3, x = self.perturb3(x, prompts), self.latent(self.down3(x))
        x = self.up4(self.perturb4(x, prompts))
        x = self.decoder3(self.reduce3(x, skip3))
        x = self.decoder2(self.reduce2(self.up3(x), skip2))
        x = self.refinement(self.decoder1(torch.cat([self.up2(x), skip1], dim=-1)))
        residual = self.output(x).permute(0, 3, 1, 2).float()
        return F.pixel_shuffle(residual, factor) + image
