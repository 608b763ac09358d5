"""The inference form of DFPIR: the same function of the same weights, arranged for speed and for little memory.

Differences from the plain form in `models.dfpir`, none of which changes the result beyond rounding:

- Features are B x H x W x C throughout, so that a 1x1 convolution is one matrix product over all pixels.
- Every block runs over bands of rows. The wide features between a 1x1 and a 3x3 convolution exist for one band at a
  time, in the processor's cache; attention sums its Gram matrix and norms over the bands, so that it spans the whole
  image all the same. Two maps of a level's features are all that is held.
- Images of a batch go together if they fit in one band, else one by one.
- Prompts are indices into the bank. Each prompt's channel order is computed once, and folds DGCPM's two
  convolutions into one C x C matrix per prompt; every image of a batch picks its own.
- Hidden channels are filled up with zeros to a multiple of 16.
- Queries and keys are not normalised pixel by pixel: their norms divide the C x C logits.
- Attention and the output projection merge into one C x C matrix per image, applied to the values.
- Reducing a concatenation is the sum of two products, without the concatenation.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import bands
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
from models.products import Product
from models.prompts import PromptBank, prompt_permutations


def _merge_output(attention: Tensor, project_out: Tensor) -> Tensor:
    """The output projection after attention as one matrix per image: B x C x C, float32.

    Args:
        attention: B x heads x C_head x C_head, float32.
        project_out: C x C, float32.
    """
    batch, heads, _, per_head = attention.shape
    columns = project_out.view(-1, heads, per_head).transpose(0, 1)
    return (columns @ attention).transpose(1, 2).reshape(batch, -1, heads * per_head)


class _FeedForward(nn.Module):
    """x + GDFN(norm(x)); B x H x W x C in and out."""

    def __init__(self, norm: ChannelLayerNorm, plain: GatedFeedForward, dtype: torch.dtype) -> None:
        super().__init__()
        matrix, taps = bands.matrix_of(plain.project_in), bands.taps_of(plain.dwconv)
        source = bands.Source(norm, bands.filled_up(matrix, 2), bands.filled_up(taps, 2))
        self.widen = bands.Widening(source, dtype=dtype)
        project_out = bands.filled_up(bands.matrix_of(plain.project_out).T, 1)
        self.project_out = Product(project_out, dtype)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Writes into `out`, another tensor of the shape of x, and returns it."""
        for band, wide in self.widen(x):
            before, after = x[:, band].flatten(0, 2), out[:, band].flatten(0, 2)
            self.project_out(wide.gated().flatten(0, 2), after, start=before)
        return out


class _SelfAttention(nn.Module):
    """x + MDTA(norm(x)); B x H x W x C in and out."""

    temperature: Tensor
    project_out: Tensor

    def __init__(self, norm: ChannelLayerNorm, plain: ChannelSelfAttention, dtype: torch.dtype) -> None:
        super().__init__()
        source = bands.Source(norm, bands.matrix_of(plain.qkv), bands.taps_of(plain.qkv_dwconv))
        self.widen = bands.Widening(source, dtype=dtype)
        self.register_buffer("temperature", plain.temperature.detach().float())
        self.register_buffer("project_out", bands.matrix_of(plain.project_out).float())

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """Changes x itself and returns it; `values` is room for another tensor of its shape."""
        similarity = bands.Similarity(len(self.temperature))
        for band, wide in self.widen(x):
            similarity.add(wide, values[:, band])
        attention = similarity.logits(self.temperature).softmax(dim=-1)
        merged = _merge_output(attention, self.project_out).to(x.dtype)
        x.flatten(1, 2).baddbmm_(values.flatten(1, 2), merged.transpose(1, 2))
        return x


class _PerturbedAttention(nn.Module):
    """CAAPM's attention on normalised features; B x H x W x C in and out.

    Queries, keys and values are float32 whatever the features' dtype: with weights rounded to bfloat16 twice as many
    rows of logits lose another entry, which has cost 0.04 dB on hazy photographs (docs/decisions/0005).
    """

    temperature: Tensor
    project_out: Tensor

    def __init__(self, block: PerturbationBlock) -> None:
        super().__init__()
        plain: PerturbedAttention = block.select_attn
        self.kept_fraction = plain.kept_fraction
        self.widen = bands.Widening(
            bands.Source(block.norm1, bands.matrix_of(plain.q), bands.taps_of(plain.q_dwconv)),
            bands.Source(block.norm2, bands.matrix_of(plain.kv), bands.taps_of(plain.kv_dwconv)),
            dtype=torch.float32,
        )
        self.register_buffer("temperature", plain.temperature.detach().float())
        scaled = bands.matrix_of(plain.project_out) * plain.attn4.detach().double()
        self.register_buffer("project_out", scaled.float())

    def forward(self, x: Tensor, shuffle: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """Attention between x after `shuffle`, and x; `values` is room for another tensor of its shape."""
        similarity = bands.Similarity(len(self.temperature))
        for band, wide in self.widen(x, shuffle):
            similarity.add(wide, values[:, band])
        logits = keep_largest(similarity.logits(self.temperature), self.kept_fraction)
        merged = _merge_output(logits.softmax(dim=-1), self.project_out).to(values.dtype)
        return torch.bmm(values.flatten(1, 2), merged.transpose(1, 2)).view(x.shape)


class _Perturbation(nn.Module):
    """DGPB with the channel orders of a bank of K prompts folded in; B x H x W x C in and out."""

    matrices: Tensor
    """K x C x C: `W_out P W_in` for each prompt's permutation P; float32, like the attention that they lead to."""
    biases: Tensor
    """K x C: `W_out P b_in + b_out`."""

    def __init__(self, plain: PerturbationBlock, orders: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        widen, narrow = bands.matrix_of(plain.conv1x1), bands.matrix_of(plain.conv_out)
        assert plain.conv1x1.bias is not None
        assert plain.conv_out.bias is not None
        widen_bias, narrow_bias = plain.conv1x1.bias.detach().double(), plain.conv_out.bias.detach().double()
        matrices = torch.stack([narrow @ widen[order] for order in orders])
        biases = torch.stack([narrow @ widen_bias[order] + narrow_bias for order in orders])
        self.register_buffer("matrices", matrices.float())
        self.register_buffer("biases", biases.float())
        self.attention = _PerturbedAttention(plain)
        self.feed_forward = _FeedForward(plain.norm3, plain.ffn, dtype)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        matrices, biases = self.matrices[prompts].transpose(1, 2), self.biases[prompts][:, None]

        def shuffle(rows: Tensor) -> Tensor:
            return torch.baddbmm(biases, rows.flatten(1, 2).float(), matrices).view(rows.shape)

        spare = torch.empty_like(x, dtype=self.dtype)
        out: Tensor = self.feed_forward(self.attention(x, shuffle, spare), spare)
        return out


class _Blocks(nn.Module):
    """Restormer's blocks, each attention and feed-forward with their residuals; B x H x W x C in and out."""

    def __init__(self, plain: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        self.attentions, self.feed_forwards = nn.ModuleList(), nn.ModuleList()
        for block in plain:
            assert isinstance(block, TransformerBlock)
            self.attentions.append(_SelfAttention(block.norm1, block.attn, dtype))
            self.feed_forwards.append(_FeedForward(block.norm2, block.ffn, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Uses x as working memory."""
        spare = torch.empty_like(x)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            x, spare = feed_forward(attention(x, spare), spare), x
        return x


class _Resample(nn.Module):
    """3x3 convolution, then halves or doubles both sides; B x H x W x C in and out."""

    kernel: Tensor

    def __init__(self, plain: Downsample | Upsample, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("kernel", bands.kernel_of(plain.body[0], dtype))
        self.rearrange = plain.body[1]

    def forward(self, x: Tensor) -> Tensor:
        moved: Tensor = self.rearrange(bands.convolve(x, self.kernel).permute(0, 3, 1, 2))
        return moved.permute(0, 2, 3, 1).contiguous()


class _Reduction(nn.Module):
    """The 1x1 convolution over a concatenation of features and skip, as two products; B x H x W x C."""

    def __init__(self, plain: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.from_features, self.from_skip = (Product(m.T, dtype) for m in bands.matrix_of(plain).chunk(2, dim=1))

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        out = torch.empty_like(features)
        rows = out.flatten(0, 2)
        self.from_features(features.flatten(0, 2), rows)
        self.from_skip(skip.flatten(0, 2), rows, start=rows)
        return out


class InferenceDFPIR(nn.Module):
    """DFPIR for a fixed bank of prompts, without gradients.

    Called as `net(image, prompts)`: image B 3 H W, float32, RGB in [0, 1], sides multiples of
    `config.size_multiple`; prompts B int64, positions in the bank. Returns B 3 H W float32, not clamped.

    With `dtype` bfloat16 the features are bfloat16, while Gram matrices, softmax, CAAPM's attention, layer norm's
    statistics and the final sum with the image stay float32. On a CPU the encoder stays float32 as well, but for what
    is added to its results on their way to the decoder: CAAPM then keeps the entries that it keeps in float32
    (docs/decisions/0014). `device` is where it is to run.
    """

    stem: Tensor
    output: Tensor

    def __init__(
        self,
        network: DFPIR,
        bank: PromptBank,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        if network.config.is_ablation:
            raise ValueError("a network without DGCPM or CAAPM is an ablation, and runs in its plain form alone")
        self.config = network.config
        self.dtype = dtype
        orders = bank.permutations or prompt_permutations(network, bank.embeddings)

        def perturbation(name: str) -> _Perturbation:
            plain = network.get_submodule(name)
            assert isinstance(plain, PerturbationBlock)
            return _Perturbation(plain, orders[name], dtype)

        # On a GPU, which has no tiles for it, a float32 encoder would be several times slower.
        on_cpu = torch.device(device).type == "cpu"
        self.encoder_dtype = exact = torch.float32 if on_cpu else dtype
        self.register_buffer("stem", bands.kernel_of(network.patch_embed.proj, exact))
        self.encoder1 = _Blocks(network.encoder_level1, exact)
        self.perturb1 = perturbation("encoder_shuffle_channel1")
        self.down1 = _Resample(network.down1_2, exact)
        self.encoder2 = _Blocks(network.encoder_level2, exact)
        self.perturb2 = perturbation("encoder_shuffle_channel2")
        self.down2 = _Resample(network.down2_3, exact)
        self.encoder3 = _Blocks(network.encoder_level3, exact)
        self.perturb3 = perturbation("encoder_shuffle_channel3")
        self.down3 = _Resample(network.down3_4, exact)
        self.latent = _Blocks(network.latent, exact)
        self.perturb4 = perturbation("latent_shuffle_channel")
        self.up4 = _Resample(network.up4_3, dtype)
        self.reduce3 = _Reduction(network.reduce_chan_level3, dtype)
        self.decoder3 = _Blocks(network.decoder_level3, dtype)
        self.up3 = _Resample(network.up3_2, dtype)
        self.reduce2 = _Reduction(network.reduce_chan_level2, dtype)
        self.decoder2 = _Blocks(network.decoder_level2, dtype)
        self.up2 = _Resample(network.up2_1, dtype)
        self.decoder1 = _Blocks(nn.Sequential(*network.decoder_level1, *network.refinement), dtype)
        self.register_buffer("output", bands.kernel_of(network.output, dtype))
        if on_cpu:
            for module in self.modules():
                if isinstance(module, Product):
                    module.pack(exact=dtype is torch.float32)
        self.requires_grad_(False).eval().to(device)

    def forward(self, image: Tensor, prompts: Tensor) -> Tensor:
        """Restores a batch; shapes and ranges stand at the class."""
        if len(image) > 1 and not self._fits_in_a_band(image):
            return torch.cat([self(image[i : i + 1], prompts[i : i + 1]) for i in range(len(image))])
        factor = self.config.unshuffle_factor
        x = F.pixel_unshuffle(image, factor).permute(0, 2, 3, 1).to(self.encoder_dtype)
        x = bands.convolve(x, self.stem)
        x = self.encoder1(x)
        # Peak memory is that of a few maps: each is let go as soon as the next is there, and a skip connection's
        # perturbation runs at once, so that only its result is kept until the decoder.
        skips = [self.perturb1(x, prompts)]
        x = self.down1(x)
        x = self.encoder2(x)
        skips.append(self.perturb2(x, prompts))
        x = self.down2(x)
        x = self.encoder3(x)
        skips.append(self.perturb3(x, prompts))
        x = self.down3(x)
        x = self.latent(x)
        x = self.perturb4(x, prompts)
        x = self.up4(x)
        x = self.reduce3(x, skips.pop())
        x = self.decoder3(x)
        x = self.up3(x)
        x = self.reduce2(x, skips.pop())
        x = self.decoder2(x)
        x = self.up2(x)
        x = torch.cat([x, skips.pop()], dim=-1)
        x = self.decoder1(x)
        residual = bands.convolve(x, self.output).permute(0, 3, 1, 2).float()
        return F.pixel_shuffle(residual, factor) + image

    def _fits_in_a_band(self, image: Tensor) -> bool:
        """Whether the widest features of all images together do: those of the first decoder level's feed-forward."""
        pixels = len(image) * image.shape[2] * image.shape[3] / self.config.unshuffle_factor**2
        wide_channels = 2 * int(2 * self.config.dim * self.config.ffn_expansion_factor)
        return pixels * wide_channels * self.dtype.itemsize <= bands.BAND_BYTES[image.device.type]
