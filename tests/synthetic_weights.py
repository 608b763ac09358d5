"""Networks and weights made up for tests."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.dfpir import DFPIR, DFPIRConfig
from models.prompts import orthogonal_bank
from models.weights import save_checkpoint

GOLDEN = Path(__file__).parent / "golden"

TINY = DFPIRConfig(
    dim=8,
    num_blocks=(1, 1, 1, 1),
    num_refinement_blocks=1,
    heads=(1, 2, 4, 8),
    unshuffle_factor=2,
)


def golden_state(keys: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The state dict of a golden network: every parameter filled from its own key, given the shapes."""
    state = {}
    for key, shape in keys.items():
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
        z = rng.standard_normal(tuple(shape))
        if len(shape) >= 2 and prod(shape[1:]) > 1:
            value = z / sqrt(prod(shape[1:]))
        elif key.endswith("bias"):
            value = 0.1 * z
        else:
            value = 1 + 0.1 * z
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


def tiny_network(seed: int = 0, *, unshuffle_factor: int = 2) -> DFPIR:
    """A DFPIR of a few thousand channels' worth of work, its random weights changing an image visibly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DFPIR(replace(TINY, unshuffle_factor=unshuffle_factor))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith(("norm1.body.bias", "norm2.body.bias", "norm3.body.bias")):
                    parameter.normal_(0, 0.1)
                elif name.endswith("temperature"):
                    parameter.uniform_(1, 4)
    return network.eval()


def write_tiny_model(path: Path, *, seed: int = 0) -> Path:
    """A `.safetensors` checkpoint of `tiny_network` with the orthogonal prompts, written to `path`."""
    save_checkpoint(
        path, tiny_network(seed), orthogonal_bank(), licence="Apache-2.0", provenance={"training": "random weights"}
    )
    return path
