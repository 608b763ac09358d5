"""Prompts: the sentences DFPIR was published with, and the embeddings that stand for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from models.dfpir import DFPIR, TEXT_DIM, PerturbationBlock, channel_order

PUBLISHED_SENTENCES: dict[str, str] = {
    "noise15": "Gaussian noise with a standard deviation of 15",
    "noise25": "Gaussian noise with a standard deviation of 25",
    "noise50": "Gaussian noise with a standard deviation of 50",
    "rain": "Rain degradation with rain lines",
    "haze": "Hazy degradation with normal haze",
    "blur": "Blur degradation with motion blur",
    "lowlight": "Lowlight degradation",
}
"""The seven prompts of the paper's five-task setting, by key."""

THREE_TASKS: dict[str, str] = {
    key: PUBLISHED_SENTENCES[key] for key in ("noise15", "noise25", "noise50", "rain", "haze")
}
"""Those of the paper's three-task setting."""

THREE_TASKS_SIMPLE: dict[str, str] = {
    "noise15": "Noise",
    "noise25": "Noise",
    "noise50": "Noise",
    "rain": "Rain",
    "haze": "Haze",
}
"""Those of the three-task checkpoint that was released as trained under simple prompts."""


@dataclass(frozen=True, eq=False)
class PromptBank:
    """The prompts a network was trained with: `keys[i]` has `sentences[i]` and row i of `embeddings`.

    `embeddings` is K x 512 float32.
    """

    keys: tuple[str, ...]
    sentences: tuple[str, ...]
    embeddings: Tensor = field(repr=False)
    permutations: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """For the network that the bank belongs to: block name to K x (expansion C) int64, the channel order of each
    prompt. Empty for a bank that belongs to no network yet.
    """

    def __post_init__(self) -> None:
        if not (len(self.keys) == len(self.sentences) == len(self.embeddings)):
            raise ValueError("a prompt bank needs one sentence and one embedding per key")
        if not self.keys:
            raise ValueError("a prompt bank needs a prompt")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError(f"the keys of a prompt bank must differ: {', '.join(self.keys)}")
        if self.embeddings.shape[1:] != (TEXT_DIM,) or self.embeddings.dtype != torch.float32:
            raise ValueError(f"embeddings must be K x {TEXT_DIM} float32, not {tuple(self.embeddings.shape)}")

    def indices(self, keys: Sequence[str]) -> list[int]:
        """Positions of `keys` in the bank; raises KeyError naming an unknown key and the known ones."""
        if unknown := sorted(map(str, set(keys) - set(self.keys))):  # None, too, of a decision to restore nothing
            raise KeyError(f"no prompt for {', '.join(unknown)}; this model knows {', '.join(self.keys)}")
        return [self.keys.index(key) for key in keys]

    def only(self, keys: Sequence[str]) -> "PromptBank":
        """The prompts of these keys alone, for no network yet; raises KeyError as `indices` does."""
        rows = self.indices(keys)
        return PromptBank(tuple(keys), tuple(self.sentences[row] for row in rows), self.embeddings[rows])


@torch.no_grad()
def prompt_guidance(network: DFPIR, embeddings: Tensor) -> dict[str, Tensor]:
    """The vectors whose descending order is each prompt's permutation, by name of the perturbation block.

    Args:
        network: in float32.
        embeddings: K x 512 float32.

    Returns:
        K x (expansion C) float32 for each block.
    """
    blocks = {name: block for name, block in network.named_modules() if isinstance(block, PerturbationBlock)}
    return {name: block.guidance(embeddings) for name, block in blocks.items()}


def prompt_permutations(network: DFPIR, embeddings: Tensor) -> dict[str, Tensor]:
    """The channel order that each prompt stands for: K x (expansion C) int64 for each perturbation block.

    Computed in float32, as in training: rounding to bfloat16 reorders most of the widest blocks.
    """
    return {name: channel_order(guidance) for name, guidance in prompt_guidance(network, embeddings).items()}


def orthogonal_bank() -> PromptBank:
    """The published sentences on a fixed table of orthogonal vectors, for models trained without CLIP.

    Row i is the Walsh function (-1)^(bit i of the position): entries are +1 and -1, and any two rows are
    exactly orthogonal. DFPIR uses a prompt through the order of a sort only, so all that matters is that
    the vectors are fixed and far apart.
    """
    positions = np.arange(TEXT_DIM)
    table = np.stack([1.0 - 2.0 * (positions >> i & 1) for i in range(len(PUBLISHED_SENTENCES))])
    return PromptBank(
        keys=tuple(PUBLISHED_SENTENCES),
        sentences=tuple(PUBLISHED_SENTENCES.values()),
        embeddings=torch.from_numpy(table.astype(np.float32)),
    )
