"""What a released DFPIR checkpoint holds beside its network, and the configuration that its tensors' shapes tell."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from models.dfpir import DFPIRConfig
from models.errors import WeightsError

_LEVELS = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
_UNUSED = re.compile(r"_shuffle_channel[123]?\.select_attn\.attn[123]$")


def infer_config(path: Path, state: Mapping[str, Tensor]) -> DFPIRConfig:
    """The configuration that a state dict was made with.

    What no shape tells (the kept fraction of attention), or what a missing entry would have told, is as published:
    comparing keys and shapes with the network so configured names everything that is wrong.

    Raises:
        WeightsError: the shapes fit no DFPIR at all.
    """
    published = DFPIRConfig()

    def shape(key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        found = tuple(state[key].shape) if key in state else default
        return found if len(found) == len(default) else default

    def count(default: int, *levels: str) -> int:
        indices = {key.partition(".")[2].partition(".")[0] for key in state if key.partition(".")[0] in levels}
        return max((int(i) + 1 for i in indices if i.isdecimal()), default=default)

    # Each figure from two places, so that one missing entry does not make all others look wrong.
    stem = shape("patch_embed.proj.weight", (0, 0, 3, 3))
    dim = stem[0] or shape("encoder_level1.0.norm1.body.weight", (published.dim,))[0]
    image_channels = stem[1] or shape("output.weight", (3, 2 * dim, 3, 3))[0]
    wide = shape("encoder_shuffle_channel1.conv1x1.weight", (published.shuffle_expansion * dim, dim, 1, 1))[0]
    heads = [
        shape(f"{level}.0.attn.temperature", (default, 1, 1))[0]
        for level, default in zip(_LEVELS, published.heads, strict=True)
    ]
    hidden = {
        dim * 2**i: shape(f"{level}.0.ffn.project_out.weight", (dim * 2**i, 0, 1, 1))[1]
        for i, level in enumerate(_LEVELS)
    }
    try:
        blocks = [
            count(default, level, level.replace("encoder", "decoder"))
            for level, default in zip(_LEVELS, published.num_blocks, strict=True)
        ]
        return DFPIRConfig(
            dim=dim,
            num_blocks=(blocks[0], blocks[1], blocks[2], blocks[3]),
            num_refinement_blocks=count(published.num_refinement_blocks, "refinement"),
            heads=(heads[0], heads[1], heads[2], heads[3]),
            ffn_expansion_factor=_expansion({channels: h for channels, h in hidden.items() if h}),
            shuffle_expansion=wide // dim,
            unshuffle_factor=math.isqrt(image_channels // 3),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{path}: the shapes of its tensors fit no DFPIR: {error}") from error


def without_unused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without three numbers in each perturbation's attention that no network has any more.

    Released checkpoints have kept them from an attention of four masks, each with a weight of its own, of which one is
    left (`attn4`); the authors' scripts drop whatever their network does not have.
    """
    return {key: value for key, value in state.items() if not (_UNUSED.search(key) and value.numel() == 1)}


def wrapped_prefix(keys: Collection[str]) -> str:
    """What every key begins with where the network was a part of another when it was saved; otherwise nothing."""
    known = "patch_embed.proj.weight"
    prefix = next((key.removesuffix(known) for key in keys if key.endswith(f".{known}")), "")
    return prefix if all(key.startswith(prefix) for key in keys) else ""


def _expansion(hidden: Mapping[int, int]) -> float:
    """The expansion for which `int(channels * expansion)` gives each hidden width; the shortest decimal that does."""
    published = DFPIRConfig().ffn_expansion_factor
    if not hidden:
        return published
    low = max(h / channels for channels, h in hidden.items())
    candidates: list[float] = [published, *(math.ceil(low * 10**digits) / 10**digits for digits in range(7))]
    for candidate in candidates:
        if all(int(channels * candidate) == h for channels, h in hidden.items()):
            return candidate
    raise ValueError(f"no expansion of the feed-forward gives the widths {dict(hidden)} (channels: hidden)")
